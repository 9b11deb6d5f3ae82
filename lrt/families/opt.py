"""OPT: learned positions whose table begins two rows later, dropouts that are no modules, an MLP of bare layers."""

from lrt.families.description import Family, Foreign


def attention_rate(attention: Foreign) -> float:
    return attention.dropout


def output_rate(attention: Foreign) -> float:
    return attention.config.dropout


def block_rate(block: Foreign) -> float:
    return block.dropout


OPT = Family(
    name="opt",
    embedding="model.decoder.embed_tokens",
    position_embedding="model.decoder.embed_positions",
    position_offset=2,
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    attention_in=("self_attn_layer_norm",),
    output_dropout=output_rate,
    mlp=("fc1", "activation_fn", "fc2"),
    mlp_in=("final_layer_norm",),
    mlp_dropout=block_rate,
    output="self_attn.out_proj",
    scaled_query=True,
    dropout=attention_rate,
)
