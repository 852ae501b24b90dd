"""What the completion table says of a row: enough to show it again, segment by segment."""

import json

from rex_rag.probes.mixed_sampling import MixedBatch
from rex_rag.training.group_rows import Slots, completion_columns
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
    probe = Trajectory([1], [Segment(SegmentKind.PROBE, [5], "Hm")], parent=0, cut=0)
    inputs = [{"question": "q", "golden_answers": ["g", "h"], "prompt": "p"}] * 3
    batch = MixedBatch([row], [False], [probe], [False], 1, 1, 1, 1, 1)
    columns = completion_columns(Slots([row, probe, None], batch), inputs, rank=3)
    assert columns == {
        "rollout": ["3.0", "3.1", None],
        "parent": [None, "3.0", None],
        "cut": [None, 0, None],
        "tool_uses": ["[]", "[]", None],
        "question": ["q"] * 3,
        "golden_answers": [["g", "h"]] * 3,
        "trajectory": [
            "[POLICY] <search> x </search>\n[INFORMATION] <information>a\n[POLICY] b</information>",
            "[PROBE] Hm",
            None,
        ],
        "segments": [
            json.dumps(
                [
                    {"kind": "POLICY", "text": "<search> x </search>"},
                    {"kind": "INFORMATION", "text": "\n\n<information>a\n[POLICY] b</information>\n\n"},
                ]
            ),
            json.dumps([{"kind": "PROBE", "text": "Hm"}]),
            None,
        ],
        "predicted_answer": ["Émile", None, None],
    }
