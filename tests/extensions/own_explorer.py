"""An explorer of one's own: always the same doubt, before the answer. `explorer: own_explorer:Same`."""

from rex_rag.probes.explorer import Explorer, Proposal
from rex_rag.rollout.cuts import tokens_before


class Same(Explorer):
    name = "same"

    def __init__(self, agent, args, score):
        self.script = agent.script

    def propose(self, failed):
        return [self.one(each) for each in failed]

    def one(self, failed):
        span = failed.original.answer_span
        answered = failed.original.segments[span.segment]
        kept, leftover = tokens_before(answered, span.offset, self.script.decode)
        text = leftover + "<think> Hm</think>"
        ids = self.script.tokenizer(text, add_special_tokens=False)["input_ids"]
        head = answered.text[: span.offset - len(leftover)]
        # It follows from the original: nothing was drawn, so every token has probability 1.
        return Proposal(failed.index, span.segment, kept, head, ids, text, [0.0] * len(ids))
