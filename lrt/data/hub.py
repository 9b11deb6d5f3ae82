"""Datasets of the Hugging Face hub, fetched once into its cache."""

from __future__ import annotations

PREFIX = "hf://datasets/"


def download(spec: str, *, key: str) -> str:
    """Fetch the parquet files of a dataset, with a progress bar; a broken download goes on where it stopped.

    Args:
        spec: ``hf://datasets/OWNER/NAME``, optionally ``@REVISION`` and a folder or glob inside it, such as
            ``hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT``.
        key: recipe key, for the messages.

    Returns:
        The local folder, glob or file.

    Raises:
        ValueError: not such an address, or it could not be fetched.
    """
    parts = spec.removeprefix(PREFIX).strip("/").split("/")
    if not spec.startswith(PREFIX) or len(parts) < 2 or not all(parts):
        raise ValueError(f"{key} = {spec!r}: write hf://datasets/OWNER/NAME, with a folder or glob behind it if wanted")
    import huggingface_hub

    name, _, revision = parts[1].partition("@")
    inside = "/".join(parts[2:])
    exact = inside.endswith(".parquet")
    patterns = [inside] if exact else [f"{inside}/*.parquet" if inside else "*.parquet"]
    try:
        folder = huggingface_hub.snapshot_download(
            f"{parts[0]}/{name}", repo_type="dataset", revision=revision or None, allow_patterns=patterns
        )
    except (OSError, ValueError) as error:  # the hub's errors, and those of the connection, are OSErrors
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{key} = {spec!r} could not be fetched ({first_line}): check the name and the connection, or give local files"
        ) from None
    return f"{folder}/{inside}" if inside else str(folder)
