"""A method of one's own: answer with the title of the first passage. `--method own_method:FirstTitle`."""

from rex_rag.evaluation.methods import Method
from rex_rag.rollout.script import Generate, search


class FirstTitle(Method):
    name = "first_title"
    title = "First title"
    source = "nobody"
    uses_retriever = True
    default_template = "Say yes.\n{question}"
    stop_strings = ((),)

    def script(self, attempt):
        attempt.trajectory.prompt_ids = attempt.tools.encode_chat(self.prompt_text(attempt.question))
        [found] = yield search(attempt.question.question)
        yield Generate(attempt.trajectory.prompt_ids, limit=2)
        attempt.trajectory.answer = found.passages[0].title
