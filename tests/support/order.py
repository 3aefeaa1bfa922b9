"""The order of test files for several processes, each of which runs whole files: the longest first.

A file that takes minutes and starts last would keep one core busy while the others wait for its end.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# By their seconds, those of an export that they are the first to need among them.
LONGEST = (
    "export/engines/test_tensorrt.py",
    "end_to_end/test_transformers.py",
    "export/engines/test_transformers.py",
    "end_to_end/test_faults.py",
    "end_to_end/test_families.py",
    "end_to_end/test_shipped_transformer.py",
    "end_to_end/test_single_files.py",
    "end_to_end/test_editing_by_instruction.py",
    "end_to_end/test_loras.py",
    "export/conversion/test_linking.py",
    "export/engines/test_qdq.py",
    "end_to_end/test_transformer_loras.py",
    "end_to_end/test_text_encoder_files.py",
    "end_to_end/test_shipped_model.py",
    "test_schedulers.py",
    "gateway/test_playground.py",
    "export/engines/test_quantization.py",
    "end_to_end/test_lifecycle.py",
    "end_to_end/test_batching.py",
    "export/repository/test_export.py",
    "gateway/embedded/test_surroundings.py",
    "end_to_end/test_soak.py",
    "end_to_end/test_replicas.py",
    "export/test_cli.py",
    "end_to_end/test_command.py",
    "end_to_end/test_production.py",
)


def sort_by_length(items: list[pytest.Item]) -> None:
    """Sort whole files: the longest, then by number of tests, as xdist would all of them."""
    ranks = {TESTS / file: rank for rank, file in enumerate(LONGEST)}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -tests[item.path], str(item.path)))
