"""What the completion table says of a row: enough to show it again, segment by segment."""

import json

from rex_rag.training.group_rows import completion_columns
from rex_rag.types import Segment, SegmentKind, Trajectory


def test_completion_columns_keep_segments_apart_and_leave_empty_slots_empty():
    row = Trajectory(
        prompt_ids=[1],
        segments=[
            Segment(SegmentKind.POLICY, [2, 3], "<search> x </search>"),
            # Rendered, this passage would pass for a segment of its own.
            Segment(SegmentKind.INFORMATION, [4], "\n\n<information>a\n[POLICY] b</information>\n\n"),
        ],
        answer="Émile",
    )
    inputs = [{"question": "q", "golden_answers": ["g", "h"], "prompt": "p"}] * 2
    assert completion_columns([row, None], inputs) == {
        "question": ["q", "q"],
        "golden_answers": [["g", "h"], ["g", "h"]],
        "trajectory": [
            "[POLICY] <search> x </search>\n[INFORMATION] <information>a\n[POLICY] b</information>",
            None,
        ],
        "segments": [
            json.dumps(
                [
                    {"kind": "POLICY", "text": "<search> x </search>"},
                    {"kind": "INFORMATION", "text": "\n\n<information>a\n[POLICY] b</information>\n\n"},
                ]
            ),
            None,
        ],
        "predicted_answer": ["Émile", None],
    }
