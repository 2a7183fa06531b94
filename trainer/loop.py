"""The training loop. Everything beyond a plain optimizer step lives in callbacks."""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from data.batches import Batch, BatchStream
from data.errors import InputError, explain
from data.log import logger
from trainer.config import TrainConfig
from trainer.distillation import Teacher
from trainer.memory import collected_together, explain_out_of_memory, peak_memory
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.masks import Masks
from trainer.optimizer import clip_gradients
from trainer.parallel import DistributedContext, prepare_pass
from trainer.schedule import learning_rate
from trainer.throughput import Throughput


class Callback:
    """Base class of everything that hooks into `trainer.loop.Trainer`.

    The hooks run in the order of the trainer's list of callbacks, on every rank. A hook that
    communicates must do so on every rank. A callback reads and writes the trainer it is given:

    * `trainer.step`: completed optimizer steps; during a step its own zero-based number.
    * `trainer.masks`: `trainer.models.masks.Masks` or None; set in `on_step_start` for every
      forward of the step, or in `on_micro_batch` for the next one.
    * `trainer.record`: metrics of the step, JSON-able, written to metrics.jsonl as one line.
    * `trainer.bar_fields`: what the progress bar shows next to the loss, already formatted.
    * `trainer.context.all_reduce_sum(tensor)`: sums a tensor over ranks in place and returns it.
    """

    name: ClassVar[str]
    """Key of this callback's state in a checkpoint; unique among the callbacks of a trainer."""

    optional_state: ClassVar[bool] = False
    """Whether a run may be resumed with this callback added or left out, its state then starting
    anew or being dropped."""

    alone: ClassVar[bool] = False
    """Whether `on_step_end` concerns one rank alone: it communicates nothing and has no state to
    save. Where it fails on some ranks, all of them save what is trained before they stop."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Before the first step, after a checkpoint (if any) was restored."""

    def on_step_start(self, trainer: "Trainer") -> None:
        """Before the batch is drawn."""

    def on_micro_batch(self, trainer: "Trainer") -> None:
        """Before each forward pass; `trainer.micro_batch` is its number on this rank."""

    def after_backward(self, trainer: "Trainer") -> None:
        """After the last backward pass of the step.

        Gradients of the model are complete (summed over micro-batches and ranks). Gradients of
        tensors that a callback owns are local to the rank: the loss is already divided by the
        step's global number of target tokens, so a plain sum over ranks completes them.
        `trainer.record` holds the step's losses.
        """

    def before_optimizer_step(self, trainer: "Trainer") -> None:
        """After clipping, before the model changes; `trainer.record` holds `grad_norm`."""

    def after_optimizer_step(self, trainer: "Trainer") -> None:
        """After the optimizer changed the model: update what else is trained.

        The step's time and tokens/s include it; `trainer.step` is still the step's zero-based
        number.
        """

    def on_step_end(self, trainer: "Trainer") -> None:
        """After the optimizer step; `trainer.step` counts it. Not part of the step's time."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last step, or after a stop that was asked for (`trainer.stopping`)."""

    def on_error(self, trainer: "Trainer") -> None:
        """After an error on every rank alike that left everything as after step `trainer.step`:
        save what would be lost. The error is raised afterwards."""

    def on_exit(self, trainer: "Trainer") -> None:
        """When the loop is left, also by an exception: release what is held, do not communicate."""

    def state_dict(self) -> dict[str, Any]:
        """State saved in checkpoints: tensors, numbers, strings, lists and dictionaries, equal on
        all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors arrive on the CPU."""


class Trainer:
    """A model, its optimizer and data stream, and the callbacks around each step; one per rank."""

    def __init__(
        self,
        *,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        stream: BatchStream,
        config: TrainConfig,
        context: DistributedContext,
        throughput: Throughput,
        callbacks: list[Callback],
        teacher: Teacher | None = None,
    ) -> None:
        names = [callback.name for callback in callbacks]
        assert len(set(names)) == len(names), f"callback names repeat: {names}"
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.config = config
        self.context = context
        self.throughput = throughput
        self.callbacks = callbacks
        self.step = 0
        """Completed optimizer steps."""
        self.tokens = 0
        """Tokens of all batches drawn so far, over all ranks."""
        self.loss = float("nan")
        """Training loss of the last step, per target token."""
        self.masks: Masks | None = None
        """Masks of the current pass, set by a callback in on_step_start or on_micro_batch."""
        self.micro_batch = 0
        """Number of the current micro-batch of this rank, from 0, within its step."""
        self.teacher = teacher
        """The frozen model that training follows besides the text."""
        self.record: dict[str, Any] = {}
        """Metrics of the current step."""
        self.bar_fields: dict[str, str] = {}
        """What the progress bar shows besides loss, learning rate and speed."""
        self.domain_loss_sum: dict[str, float] = {}
        """Sum of the step's token losses per domain, over all ranks."""
        self.domain_tokens: dict[str, int] = {}
        """Number of the step's target tokens per domain, over all ranks."""
        self.stopping = False
        """Set (on every rank) by a callback to leave the loop after the current step."""
        self.failure: Exception | None = None
        """What this rank alone failed of at the end of the step; a callback sets `stopping` on all
        ranks for it."""
        self._changing = False
        """Whether a step is under way whose gradients or updates are not complete."""
        self._calling: Callback | None = None
        """The callback that was called last."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in a step."""
        return self.config.global_batch // (self.context.world * self.config.micro_batch)

    def fit(self) -> None:
        """Trains from `self.step` to the configured steps, or until a callback sets `stopping`."""
        try:
            with explain_out_of_memory(self.config), collected_together(self.context):
                self._call("on_train_start")
                while self.step < self.config.steps and not self.stopping:
                    self._train_or_save()
                if self.stopping:
                    self._raise_failure()
                self._call("on_train_end")
        finally:
            self._leave()

    def _leave(self) -> None:
        """Calls on_exit of all callbacks, whichever fails: none may hide what ends the training."""
        for callback in self.callbacks:
            try:
                callback.on_exit(self)
            except OSError as error:
                logger.warning(f"while {callback.name} was closed: {explain(error)}")

    def _train_or_save(self) -> None:
        """One step. Lets callbacks save when it fails before its batch is there, as by a damaged
        shard, or after its update."""
        step, order = self.step, self.stream.state_dict()
        try:
            self.train_step()
        except Exception as error:
            # InputErrors are raised on all ranks together. Of others the peers may know nothing,
            # and saving takes all of them.
            together = isinstance(error, InputError) or self.context.world == 1
            if together and not self._changing and (self.step == step or self._is_whole()):
                if self.step == step:
                    self.stream.load_state_dict(order)
                self._call("on_error")
            raise

    def _is_whole(self) -> bool:
        """Whether no callback's state misses a step at whose end one of them failed."""
        assert self._calling is not None
        rest = self.callbacks[self.callbacks.index(self._calling) :]
        return all(callback.optional_state or not callback.state_dict() for callback in rest)

    def train_step(self) -> None:
        """One optimizer step on one global batch."""
        self.throughput.start_step()
        self.record = {"step": self.step + 1}
        self._call("on_step_start")
        batch = self.context.raise_on_any_rank(self.stream.next)
        self._changing = True
        self._forward_backward(batch)
        self._call("after_backward")
        norm = clip_gradients(self.model, self.config.clip, self.context.mesh)
        self.record["grad_norm"] = norm.item()
        self._call("before_optimizer_step")
        self.record["lr"] = self._set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._call("after_optimizer_step")
        self.step += 1
        step_tokens = self.config.global_batch * self.config.seq_len
        self.tokens += step_tokens
        self.record["tokens"] = self.tokens
        self.record["tokens_per_second"] = self.throughput.end_step(step_tokens)
        self._changing = False
        self.record |= peak_memory(self.context.device)
        self._end_step()

    def _end_step(self) -> None:
        for callback in self.callbacks:
            self._calling = callback
            try:
                callback.on_step_end(self)
            except Exception as error:
                # Its peers, which know nothing of it, are told when all ranks have saved.
                if not callback.alone or self.context.world == 1:
                    raise
                self.failure = error

    def _raise_failure(self) -> None:
        """Raises what one rank alone failed of, on the others as an InputError; nothing where the
        ranks were asked to stop. Collective."""
        own = self.failure
        told = None if own is None else explain(own) or f"{type(own).__name__}: {own}"
        for rank, text in enumerate(self.context.gather(told)):
            if text is not None:
                raise own or InputError(
                    f"rank {rank} ended after step {self.step}, which is saved ({text}); run the "
                    "same command again to resume"
                )

    def _forward_backward(self, batch: Batch) -> None:
        """Accumulates the gradient of the sum of token losses over the global number of targets."""
        device = self.context.device
        ids = torch.from_numpy(batch.ids).to(device, non_blocking=True)
        domains = torch.from_numpy(batch.domains).to(device, non_blocking=True)
        documents = None
        if batch.documents is not None:
            documents = torch.from_numpy(batch.documents).to(device, non_blocking=True)
        targets, valid = next_token_targets(ids, batch.valid, documents)
        # A batch of conversations that are cut off may have no target at all.
        total = self.context.all_reduce_sum(valid.sum()).clamp(min=1)
        weights = valid.float() / total
        micro = self.config.micro_batch
        starts = range(0, len(ids), micro)
        # A matrix product adds in a fixed order, which scattered additions on a GPU do not.
        owners = F.one_hot(domains, len(self.stream.domains)).double()
        sums = torch.zeros(3, len(self.stream.domains), dtype=torch.float64, device=device)
        for self.micro_batch, start in enumerate(starts):
            self._call("on_micro_batch")
            rows = slice(start, start + micro)
            last = start == starts[-1]
            # Weights stay gathered from one micro-batch to the next unless memory is to be saved.
            freed = last or self.config.reshard_after_forward
            prepare_pass(self.model, last=last, reshard_after_backward=freed)
            apart = None if documents is None else documents[rows]
            output = self.model(
                ids[rows],
                masks=self.masks,
                targets=targets[rows],
                weights=weights[rows],
                teacher_output=self.teacher(ids[rows], apart) if self.teacher else None,
                documents=apart,
            )
            output.loss.backward()
            sums[0] += output.token_loss.double().sum(dim=1) @ owners[rows]
            sums[1] += valid[rows].double().sum(dim=1) @ owners[rows]
            if output.token_kl is not None:
                sums[2] += output.token_kl.double().sum(dim=1) @ owners[rows]
        self._record_losses(self.context.all_reduce_sum(sums).cpu().numpy())

    def _record_losses(self, sums: np.ndarray) -> None:
        names = self.stream.domains
        self.domain_loss_sum = {name: float(sums[0, i]) for i, name in enumerate(names)}
        self.domain_tokens = {name: int(sums[1, i]) for i, name in enumerate(names)}
        count = max(1.0, float(sums[1].sum()))
        self.loss = float(sums[0].sum() / count)
        self.record["loss"] = self.loss
        if sums[1].sum() < self.config.global_batch * (self.config.seq_len - 1):
            # Padding, questions and ends of documents train nothing.
            self.record["targets"] = int(sums[1].sum())
        self.record["domain_loss"] = {
            name: self.domain_loss_sum[name] / count
            for name, count in self.domain_tokens.items()
            if count
        }
        if self.teacher is not None:
            divergence = float(sums[2].sum() / count)
            self.record["distill_kl"] = divergence
            self.bar_fields["kl"] = f"{divergence:.3f}"

    def _set_learning_rate(self) -> float:
        config = self.config
        assert config.min_lr_ratio is not None, "options are resolved before training"
        assert config.warmup_ratio is not None, "options are resolved before training"
        rate = learning_rate(
            self.step,
            steps=config.steps,
            peak=config.lr,
            warmup_ratio=config.warmup_ratio,
            min_ratio=config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            self._calling = callback
            getattr(callback, hook)(self)
