"""A run that stops where numbers are no numbers any more, before it saves or optimises them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rex_rag.support.errors import RunEnded
from rex_rag.training.checkpoints import newest_whole
from rex_rag.training.grpo_seams import GRPOSeams


class NonFinite(RunEnded):
    """A loss, a gradient or weights are NaN or infinite; the message names the last good checkpoint."""


class FiniteTrainer(GRPOSeams):
    """A GRPOTrainer that ends with `NonFinite` instead of going on with NaN or infinity.

    Looked at: the loss of every micro-batch, the gradient's norm before every update, weights before every generation
    batch and before every save. A process sees its own shard of sharded weights; one that ends takes the job along.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(loss):
            odd = [
                f"{name} ({(~torch.isfinite(value)).sum()} of {value.numel()} entries)"
                for name, value in inputs.items()
                if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all()
            ]
            self._end(f"the loss is {loss.item()}", f"; not finite among its inputs: {', '.join(odd) or 'none'}")
        return loss

    def before_batch(self) -> None:
        super().before_batch()
        if self.model.training:
            self._refuse(self.model.named_parameters(), "before generating")

    def before_update(self, gradient_norm: float | torch.Tensor | None) -> None:
        super().before_update(gradient_norm)
        if gradient_norm is not None and not torch.isfinite(torch.as_tensor(gradient_norm)):
            self._end(f"the gradient's norm is {float(gradient_norm)}")

    def before_save(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().before_save(weights)
        self._refuse(weights, "before saving")

    def _refuse(self, weights: Iterable[tuple[str, Any]], when: str) -> None:
        if odd := nonfinite(weights):
            self._end(
                f"{when}, {len(odd)} weight tensors are not finite ({', '.join(odd[:3])}{', …' * (len(odd) > 3)})"
            )

    @contextmanager
    def finite_sampling(self) -> Iterator[None]:
        """Around sampling: weights that are finite may yet give logits that are not."""
        try:
            yield
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch.multinomial's words
                raise
            self._end("no token can be sampled, since logits are not finite")

    def _end(self, what: str, details: str = "") -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        good = newest_whole(output, before=step)  # behind it a step was taken that was finite
        said = [f"step {step + 1}: {what}{details}. Nothing of it was saved"]
        if (output / f"checkpoint-{step}").is_dir():
            said.append(f"checkpoint-{step} holds the weights that gave it")
        said.append(f"the last good checkpoint is {good}" if good else f"{output} holds no good checkpoint")
        raise NonFinite(
            f"{'; '.join(said)}. Start from good weights (model_name_or_path) with a lower learning_rate (it is "
            f"{self.args.learning_rate:g}) or max_grad_norm (it is {self.args.max_grad_norm:g})"
        )


def nonfinite(weights: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of tensors that hold NaN or infinity. Of a tensor that is sharded (ZeRO-3, FSDP2) this process's part."""
    names, sums = [], []
    for name, weight in weights:
        own = getattr(weight, "ds_tensor", weight)
        own = own.to_local() if hasattr(own, "to_local") else own
        if isinstance(own, torch.Tensor) and own.is_floating_point() and own.numel():
            names.append(name)
            sums.append(own.detach().sum(dtype=torch.float32))
    if not sums:
        return []
    finite = torch.stack([one.to(sums[0].device) for one in sums]).isfinite().tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
