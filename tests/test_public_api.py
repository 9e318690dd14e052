"""What a user imports, and what an import must not cost."""

import subprocess
import sys

import pytest

import headrace


def test_public_names_exist() -> None:
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    assert dir(headrace) == sorted(headrace.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        headrace.LMM  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "headrace",
        "headrace.errors",
        "headrace.config",
        "headrace.costs.memory",
        "headrace.machine",
        "headrace.cache.block_manager",
        "headrace.engine.scheduler",
        "headrace.engine.plan",
        "headrace.models.families",
        "headrace.tokenizer",
        "headrace.cli.main",
    ],
)
def test_policy_and_command_line_import_no_torch(module: str) -> None:
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
