"""What names the base model that a selection, an adapter or a checkpoint belongs to?"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """The base model's files, by content."""

    # Where it came from (folder name or hub name); shown to people, never compared.
    name: str
    # Hash over the weight files and the model config; equal files have equal hashes wherever they lie.
    sha256: str
