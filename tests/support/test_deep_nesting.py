"""JSON that is nested too deeply for the parser: one error that names the file, and never a traceback."""

from __future__ import annotations

import pytest

from rex_rag.agent import AGENT_FILE, AgentSettings
from rex_rag.evaluation.judge import JUDGE_FILE, judge_of
from rex_rag.evaluation.records import RUN_FILE
from rex_rag.evaluation.run_card import read_card
from rex_rag.models.files import check_model
from rex_rag.protocols import SearchR1
from rex_rag.protocols.base import SEARCH, ToolSpec
from rex_rag.retrieval.bm25.retriever import SETTINGS_FILE, read_settings
from rex_rag.retrieval.manifest import MANIFEST_FILE, Manifest
from rex_rag.support.errors import UserError
from rex_rag.visualization.curves import read_log_history

DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (RUN_FILE, read_card),
        (JUDGE_FILE, judge_of),
        (MANIFEST_FILE, Manifest.read),
        (SETTINGS_FILE, read_settings),
        (AGENT_FILE, lambda folder: AgentSettings.load(str(folder))),
        ("trainer_state.json", read_log_history),
        ("config.json", lambda folder: check_model(str(folder))),
    ],
)
def test_a_file_is_named(tmp_path, name, read):
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError) as raised:
        read(tmp_path)
    assert str(tmp_path / name) in str(raised.value) and len(str(raised.value)) < 1000


def test_what_a_model_writes_is_no_action_and_no_crash():
    two = {"a": {"type": "string"}, "b": {"type": "string"}}
    pair = ToolSpec("pair", "takes two", {"type": "object", "properties": two})
    assert SearchR1(tools=[SEARCH, pair]).parse(f"<pair>{DEEP}</pair>") is None
