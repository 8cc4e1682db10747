"""Families that nobody wrote: read from a file, or proposed from a trace and then proved."""

from hf_prune.infer.description import dump_family, load_family
from hf_prune.infer.propose import TOLERANCE, infer_family, prove_family

__all__ = ["TOLERANCE", "dump_family", "infer_family", "load_family", "prove_family"]
