"""The oracle: the method in plain loops, one row, one position, one head at a time.

It shares no code with the library but the parameters of the model it is given. Gradients flow, so it
also says what every gradient must be.
"""

from __future__ import annotations

import math

import torch

EPS = torch.finfo(torch.float64).eps


def norm(x):
    return x / torch.sqrt((x * x).mean() + EPS)


class Oracle:
    """Runs a native LatentRecurrentModel's parameters over one row of token ids (float64)."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, list(tokens)
        self.config = model.backbone.config
        self.length = len(self.tokens)
        self.layers = len(model.blocks)
        self.kv = [[None] * self.length for _ in range(self.layers)]  # what the buffer holds
        self.memory = [None] * self.length
        self.hidden = [None] * self.length  # output of the last block
        self.parts = [[None] * self.length for _ in range(self.layers)]  # of the initialization, for kv_refresh

    # ------------------------------------------------------------ pieces

    def rotate(self, vector, position):
        half = self.config.head_dim // 2
        angle = torch.tensor([position / self.config.rope_base ** (2 * i / self.config.head_dim) for i in range(half)])
        left, right = vector[:half], vector[half:]
        turned = torch.cat([left * angle.cos() + right * angle.sin(), right * angle.cos() - left * angle.sin()])
        return norm(turned) if self.config.qk_norm else turned

    def receives(self, layer):
        return self.model.recurrence is not None and layer in self.model.receivers

    def received(self, t):
        recurrence = self.model.recurrence
        if t == 0 or recurrence is None or self.memory[t - 1] is None:
            return torch.zeros(self.config.d_model)
        if recurrence.separator is not None and self.tokens[t] == recurrence.separator:
            return torch.zeros(self.config.d_model)
        return self.memory[t - 1]

    def added(self, stream, memory):
        if self.model.recurrence.residual != "projected":
            return memory
        return torch.sqrt((stream * stream).mean()).detach() * norm(self.model.injection.map.weight @ memory)

    def gate(self, gate, normed):
        return 2 * torch.sigmoid(gate.weight @ normed[: gate.channels])

    def documents_differ(self, t, s):
        cut = self.config.attention_reset
        return cut is not None and any(self.tokens[i] == cut for i in range(s + 1, t + 1))

    # ------------------------------------------------------------ one pass

    def run(self, positions, memory):
        """One forward over ``positions``; ``memory`` maps a position to the vector it receives."""
        backbone, config = self.model.backbone, self.config
        start = {t: norm(backbone.embedding.weight[self.tokens[t]]) for t in positions}
        x = dict(start)
        for layer in range(self.layers):
            wrapper = self.model.blocks[layer]
            block, window = wrapper.block, config.windows()[layer]
            query = {}
            for t in positions:
                if backbone.residual_scales is not None:
                    x[t] = backbone.residual_scales[layer] * x[t]
                if backbone.embedding_scales is not None:
                    x[t] = x[t] + backbone.embedding_scales[layer] * start[t]
                if self.receives(layer) and self.model.injection is not None:
                    x[t] = x[t] + self.model.injection.gains[self.model.receivers.index(layer)] * self.added(
                        x[t], memory[t]
                    )
                normed = norm(x[t])
                query[t] = (block.query.weight @ normed).view(config.heads, -1)
                token_value = torch.zeros(config.kv_heads, config.head_dim)
                if block.value_gate is not None:
                    embedded = backbone.value_embeddings[str(layer)].weight[self.tokens[t]].view(config.kv_heads, -1)
                    token_value = self.gate(block.value_gate, normed)[:, None] * embedded
                gates = None if wrapper.gate is None else self.gate(wrapper.gate, normed)
                self.parts[layer][t] = (
                    (normed, token_value, gates) if self.parts[layer][t] is None else self.parts[layer][t]
                )
                self.kv[layer][t] = self.finish(layer, t, (normed, token_value, gates), memory[t])
            for t in positions:
                mixed = []
                for head in range(config.heads):
                    group = head // (config.heads // config.kv_heads)
                    scores, values = [], []
                    for s in range(t + 1):
                        if (window is not None and t - s > window) or self.documents_differ(t, s):
                            continue
                        key, value = self.kv[layer][s]
                        scores.append(self.rotate(query[t][head], t) @ key[group] / math.sqrt(config.head_dim))
                        values.append(value[group])
                    mixed.append((torch.softmax(torch.stack(scores), 0)[:, None] * torch.stack(values)).sum(0))
                x[t] = x[t] + block.output.weight @ torch.cat(mixed)
                x[t] = x[t] + block.mlp_out.weight @ torch.relu(block.mlp_in.weight @ norm(x[t])) ** 2
            if layer + 1 == self.model.source:
                fresh = {t: norm(x[t]) for t in positions}
        for t in positions:
            self.hidden[t] = x[t]
            if self.model.source:
                self.memory[t] = fresh[t]

    def finish(self, layer, t, parts, memory):
        normed, token_value, gates = parts
        wrapper, heads = self.model.blocks[layer], self.config.kv_heads
        aligned = gates is not None and self.model.recurrence.projection == "aligned"
        if aligned:
            normed = normed + self.model.memory_projection.map.weight @ memory
        key = (wrapper.block.key.weight @ normed).view(heads, -1)
        value = (wrapper.block.value.weight @ normed).view(heads, -1)
        if gates is not None:
            key, value = gates[:heads, None] * key, gates[:heads, None] * value
        if gates is not None and not aligned:
            remote = gates[heads:, None]
            projection = wrapper.projection if wrapper.projection is not None else self.model.memory_projection
            key = key + remote * (projection.key.weight @ memory).view(heads, -1)
            value = value + remote * (projection.value.weight @ memory).view(heads, -1)
        return torch.stack([self.rotate(k, t) for k in key]), value + token_value

    # ------------------------------------------------------------ schedules

    def zero(self):
        return {t: torch.zeros(self.config.d_model) for t in range(self.length)}

    def initialize(self):
        self.run(range(self.length), self.zero())
        return [self.logits()]

    def interleaved(self, subsets, sweeps=1, kv_refresh=False):
        """Logits (T, V) of every loss group."""
        groups = self.initialize()
        subsets = min(subsets, self.length)
        for _ in range(sweeps):
            visited = set()
            for residue in range(subsets):
                if kv_refresh:
                    self.refresh(visited)
                chosen = range(residue, self.length, subsets)
                self.run(chosen, {t: self.received(t) for t in chosen})
                visited |= set(chosen)
            groups.append(self.logits())
        return groups

    def refresh(self, visited):
        for layer in self.model.receivers:
            for t in set(range(self.length)) - visited:
                self.kv[layer][t] = self.finish(layer, t, self.parts[layer][t], self.received(t))

    def refine(self, passes, settle=0):
        groups = self.initialize()
        for _ in range(settle):
            with torch.no_grad():
                self.run(range(self.length), {t: self.received(t) for t in range(self.length)})
        for _ in range(passes):
            self.run(range(self.length), {t: self.received(t) for t in range(self.length)})
            groups.append(self.logits())
        return groups

    def chunked(self, chunk):
        for start in range(0, self.length, chunk):
            chosen = range(start, min(start + chunk, self.length))
            memory = self.zero()
            memory[start] = self.received(start)
            self.run(chosen, memory)
        return [self.logits()]

    def sequential(self):
        return self.chunked(1)

    def logits(self):
        out = []
        for hidden in self.hidden:
            logits = self.model.backbone.head.weight[: self.config.vocab_size] @ norm(hidden)
            out.append(
                logits
                if self.config.softcap is None
                else self.config.softcap * torch.tanh(logits / self.config.softcap)
            )
        return torch.stack(out)


def oracle_loss(groups_by_row, targets, weights):
    """sum(w_i loss_i) / sum(w_i) over groups; ``groups_by_row[b][g]`` are logits (T, V)."""
    valid = [(b, t) for b, row in enumerate(targets.tolist()) for t, goal in enumerate(row) if goal != -100]
    losses = []
    for group in range(len(weights)):
        nats = [
            torch.logsumexp(groups_by_row[b][group][t], 0) - groups_by_row[b][group][t][targets[b, t]] for b, t in valid
        ]
        losses.append(torch.stack(nats).sum() / len(valid) if valid else torch.tensor(0.0))
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights), losses
