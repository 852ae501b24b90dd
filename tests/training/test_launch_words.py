"""What a training from the command line says before its first step and behind its last."""

from __future__ import annotations

import shlex

from tiny_training import write_tiny_recipe

from rex_rag import cli
from rex_rag.training import launch


def test_every_stage_is_named_and_the_end_says_where_to_look(tmp_path, capsys):
    recipe = write_tiny_recipe(tmp_path, log_completions=True, logging_steps=1, num_completions_to_print=0)
    assert launch.main(["--config", str(recipe)]) == 0
    written = capsys.readouterr()
    stages = [line.partition("] ")[2] for line in written.err.splitlines() if line.startswith("[") and " s] " in line]
    assert [stage.split()[0] for stage in stages] == ["reading", "2", "BM25"]
    assert "2 questions" in stages[1] and "1 passage" in stages[2] and str(tmp_path / "model") in stages[2]
    begin, *steps, saved, curves, view, ask = written.out.splitlines()[-7:]
    assert begin.startswith("training: 2 steps, ") and len(steps) == 2 and saved == f"saved to {tmp_path / 'run'}"
    for line in (curves, view, ask):  # the commands work as they stand
        command = shlex.split(line.partition("rex-rag ")[2])
        assert cli.main(command) == 0, command
    assert (tmp_path / "run" / "curves.png").is_file() and (tmp_path / "run" / "trajectories.html").is_file()
