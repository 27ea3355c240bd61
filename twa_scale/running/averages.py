"""Averages of the weights of a model while it trains, with any engine and without gathering the weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from twa_scale.average.attach import require_trainable
from twa_scale.average.average import TrainableAverage
from twa_scale.average.coefficients import Which
from twa_scale.average.score import agreed_score
from twa_scale.average.step_optimizer import refuse_copies
from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.candidates.read_ahead import Progress
from twa_scale.config import TwaConfig
from twa_scale.engines import Engine, choose_engine
from twa_scale.engines.model_checks import require_device, require_materialized
from twa_scale.errors import ConfigError, StateError, TwaError
from twa_scale.output import Files
from twa_scale.output.options import OutputOptions
from twa_scale.output.publish import target_of
from twa_scale.ranks import Pods, publish_failure, require_same_settings
from twa_scale.running import checkpoint, saving, state_file
from twa_scale.running.ema import Ema
from twa_scale.running.learned import Learned
from twa_scale.running.learning import learn, require_snapshots, settings_for
from twa_scale.running.named import mixture, names, origin
from twa_scale.running.parameters import Parameters
from twa_scale.running.repeats import Repeats
from twa_scale.running.scores import Scores
from twa_scale.running.settings import EmaOption, WindowOption, ema_settings, is_due, window_settings
from twa_scale.running.showing import Showing
from twa_scale.running.validity import Validity
from twa_scale.running.window import Window


class RunningAverages:
    """Exponential averages and the last snapshots of a model. Each rank holds those of its own weights.

    The optimizer is not changed: call `step()` after each of its steps. `weights(which)` shows an average in a `with`
    block, and `learn()` trains the coefficients of the snapshots. The averages are of the floating point parameters
    that require a gradient when this object is created.

    Args:
        model: as for `attach`; create this object after the model has been wrapped or sharded.
        ema: decays, as `[0.99, 0.999]`, or settings: `decays`, `half_life` (a fraction of the updates so far), `bema`
            (True, or its settings), `update_every` and `start_step` (in steps), `bias_correction`, `use_buffers`.
        window: settings: `every` (steps between two snapshots), `keep` (the number of snapshots), `store` (the format
            of differences: "packed1" with 1 bit, the default, to "packed8", "dense16", "dense32"), `start_step`.
        device: "auto" keeps the averages on the device of the weights; "cpu" keeps them in host memory, which is
            page-locked if the model is on a GPU. A step with an update or a snapshot then waits until the weights are
            copied to the host.
        replica_group: the replica group if there are pods, as for `attach`.

    Raises:
        ConfigError, EngineError: on every rank. An EngineError about the model itself is raised where it is found, and
            other ranks report it when they miss this rank.
    """

    @in_normal_mode
    def __init__(
        self,
        model: nn.Module | Engine,
        *,
        ema: EmaOption | None = None,
        window: WindowOption | None = None,
        device: str = "auto",
        replica_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._model = model
        self._replica_group = replica_group
        self._device = device
        with publish_failure():
            self._engine = choose_engine(model, replica_group)
        self.pods = Pods(self._engine.shard_group, self._engine.replica_group)
        """All ranks."""
        with self.pods.agree():
            require_materialized(self._engine)
            require_device(self._engine)
            of_ema, of_window = ema_settings(ema), window_settings(window)
            if of_ema is None and of_window is None:
                raise ConfigError("RunningAverages: give ema=[0.999], window={'every': 100, 'keep': 40}, or both.")
            if device not in ("auto", "cpu"):
                raise ConfigError(f"device: {device!r}; give 'auto' or 'cpu'.")
            keeps_buffers = of_window is not None or (of_ema is not None and of_ema.use_buffers)
            self._parameters = Parameters(self._engine, self.pods, device, with_buffers=keeps_buffers)
        require_same_settings(self.pods, {"ema": repr(of_ema), "window": repr(of_window), "device": device})
        with self.pods.agree():
            live = self._parameters.live()
            buffers = self._parameters.buffers() if self.pods.rank == 0 else {}  # statistics differ between ranks
            self._window: Window | None = None
            self._ema = None if of_ema is None else Ema(of_ema, live, buffers, self._parameters.allocate)
            if of_window is not None:
                self._window = Window(of_window, live, buffers, self._engine.device, device)
        self._step = 0
        self._counted: int | None = self._engine.steps_taken()
        held_on = torch.device("cpu") if device == "cpu" else None
        self._showing = Showing(self._engine, self.pods, self._parameters, self._ema, self._window, held_on)
        self._learned = Learned(self._engine, self._showing, self._recount)
        self._repeats = Repeats()
        self._validity = Validity()
        self._saved_versions: list[int] = []
        self._parameters.report_wrapper()

    @property
    def num_steps(self) -> int:
        """The number of steps that have been counted."""
        return self._step

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps of the snapshots in the window, oldest first."""
        return list(self._window.steps) if self._window else []

    @property
    def names(self) -> list[str]:
        """The averages that `weights` can show now, in addition to indices of snapshots and coefficients."""
        return names(self._ema, self._window)

    @property
    def lost(self) -> str:
        """The reason why the model has lost the trained weights after an error on some ranks, or an empty text."""
        return self._showing.lost

    @property
    def nbytes(self) -> int:
        """The bytes of the averages on this rank, and of the copy of its weights while an average is shown."""
        return sum(part.nbytes for part in (self._ema, self._window) if part) + self._showing.nbytes

    @in_normal_mode
    def step(self) -> None:
        """Count a step of the optimizer, and update the averages that are due. Not collective; asynchronous on a GPU.

        Call it after each step of the optimizer. With DeepSpeed, it may be called after each micro-batch, because
        DeepSpeed counts the steps.

        Raises:
            TwaError: the model holds other weights than those that are trained, or an update has been interrupted.
            EngineError: a parameter or a buffer was replaced by another.
        """
        self._require_own_weights("step()")
        if (count := self._engine.steps_taken()) is not None:
            if count == self._counted:
                return
            self._counted = count
        step = self._step + 1
        ema, window = self._ema, self._window
        ema = ema if ema and is_due(step, ema.settings.update_every, ema.settings.start_step) else None
        window = window if window and is_due(step, window.settings.every, window.settings.start_step) else None
        if ema or window:
            self._update(step, ema, window)
        self._step = step

    def _update(self, step: int, ema: Ema | None, window: Window | None) -> None:
        """Update the averages that are due at `step`. An error before the first write leaves all averages unchanged."""
        self._validity.require()
        versions, live = self._parameters.versions(), self._parameters.live()
        buffers = self._parameters.buffers() if window or (ema and ema.settings.use_buffers) else {}
        with self._validity.writing():
            if ema:
                ema.update(live, buffers)
            if window:
                window.take(step, live, buffers)
        if self._counted is None:  # otherwise the engine's library counts steps
            self._repeats.check(versions, live, report=self.pods.rank == 0)
        self._parameters.report_wrapper()

    @contextmanager
    def weights(self, which: Which) -> Iterator[None]:
        """Show the model with an average in a `with` block, then restore its weights and buffers. Collective.

        Within the block, this rank keeps a copy of its weights. Writes to the weights in the block are reported, and
        undone at its end. Buffers are unchanged, except with `use_buffers`, which shows the averaged buffers of the
        first rank. If the model has BatchNorm layers, compute their statistics again.

        Args:
            which: "last", the current weights; "ema", or one of several as "ema:0.999" or "ema:half-life:0.05"; "bema";
                averages of the snapshots: "mean", "linear", "minus-sqrt", "lawa:8" (the mean of at most the last 8), an
                index, n coefficients of any sum, or "window:NAME" with a name that the setting `center` takes.

        Raises:
            ConfigError: the name is unknown, or the average is not kept.
            TwaError: the average has no update or snapshot yet; its weights are not finite; a backward pass ran inside
                the block.
            RankError: another rank left the block with an error. The weights are not restored.
        """
        if self._learned:
            self._require_own_weights("weights()")
        with self._showing.weights(which, self._validity.require):
            yield

    @in_normal_mode
    def has(self, which: Which) -> bool:
        """Return whether an average can be shown, which requires an update or a snapshot.

        Raises:
            ConfigError: the name is unknown, or the average is not kept.
        """
        try:
            mixture(which, self._ema, self._window)
        except ConfigError:
            raise
        except TwaError:
            return False
        return True

    @in_normal_mode
    def origin(self, which: Which) -> dict[str, Any]:
        """Return the provenance of an average, for the `twa_scale.json` and the model card of its output.

        Raises:
            ConfigError, TwaError: as `weights` does.
        """
        return origin(which, self._step, self._ema, self._window)

    def compare(self, score: Callable[[nn.Module], float], which: Sequence[Which] | None = None) -> Scores:
        """Return the scores of several averages, each shown in turn. Collective.

        Args:
            score: called on every rank with the model, which then holds an average. It returns a number, the same on
                every rank.
            which: as for `weights`; by default, `names`.

        Returns:
            The scores by name, which print as a table. A repeated name gets a number, as in "mean (2)".

        Raises:
            ConfigError: on every rank; a score is not a number, or differs between ranks.
            TwaError: as `weights`.
        """
        scores = Scores()
        for name in self.names if which is None else which:
            with self.weights(name):
                value = score(self._engine.module)
            scores.add(str(name), agreed_score(self.pods, value, "compare"))
        return scores

    def check_learn(self, config: TwaConfig | Mapping[str, Any] | None = None) -> None:
        """Check before training that the settings are valid for `learn`. Collective.

        Raises:
            ConfigError, EngineError, TwaError: on every rank.
        """
        with self.pods.agree():
            if self._window is None:
                raise ConfigError("learn() needs window={'every': .., 'keep': ..}, whose snapshots it averages.")
            require_trainable(settings_for(self._window, config, self._device), self._engine, self.pods)

    def learn(
        self, config: TwaConfig | Mapping[str, Any] | None = None, *, files: Files | None = None
    ) -> TrainableAverage:
        """Put a trainable average of the snapshots into the model, as `attach` does with candidates. Collective.

        The window is its store. This rank keeps a copy of its weights, which `restore` writes back. Until then,
        training cannot continue.

        Args:
            config: as for `attach`, without `store`, `store_device` and `coding`, which the window determines.
            files: small files that `export` of the average writes next to the weights, as for `Snapshots`.

        Raises:
            ConfigError, EngineError, TwaError: on every rank.
        """
        with self.pods.agree():
            self._require_own_weights("learn()")
            self._validity.require()
            self._parameters.versions()
            self._parameters.report_newly_trained()
            window = require_snapshots(self._window)
            settings = settings_for(window, config, self._device)
            window.require_finite()
            buffers = self._parameters.buffers()

        def make() -> TrainableAverage:
            engine = choose_engine(self._model, self._replica_group)
            return learn(engine, self.pods, window, settings, files or {})

        return self._learned.start(make, buffers)

    @contextmanager
    def learning(
        self, config: TwaConfig | Mapping[str, Any] | None = None, *, files: Files | None = None
    ) -> Iterator[TrainableAverage]:
        """Call `learn` for a `with` block, and `restore` at its end, also after an error. Collective.

        Raises:
            ConfigError, EngineError, TwaError: as `learn`.
            RankError: another rank left the block with an error. The weights are not restored.
        """
        twa = self.learn(config, files=files)
        with self._learned.restoring():
            yield twa

    def restore(self) -> None:
        """Close the average that `learn` has made, and restore the weights and buffers of the model. Collective.

        DeepSpeed's counts of steps and samples and its loss scale are restored, too. Does nothing if `learn` has not
        been called.

        Raises:
            TwaError: the ranks can no longer restore the weights together.
        """
        self._learned.restore()

    @in_normal_mode
    def export(
        self,
        path: str | Path,
        which: Which,
        *,
        dtype: torch.dtype | None = None,
        files: Files | None = None,
        max_shard_size: str | int = "5GB",
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write an average as safetensors to the directory `path`, each rank its own part. Collective.

        Tensors have the names with which transformers saves its models and PEFT its adapters, or else those of the
        model. The output of a model that trains an adapter, and nothing else, is an adapter without the base model.

        Args:
            path: a directory that is new or empty, on a file system that all ranks share.
            which: as for `weights`, which shows the average while it is written.
            dtype: the type of the floating point tensors in the files; by default, those of the weights that are
                trained, which is float32 with DeepSpeed. Each dtype in config.json is replaced by this type.
            files: small files next to the weights, such as those of a tokenizer, as for `Snapshots`.
            max_shard_size: the maximum size of one file's tensors.
            overwrite: replaces an earlier output of twa_scale in `path`.
            progress: called on every rank that writes, with the bytes just written and the total.

        Raises:
            ConfigError, OutputError, TwaError: on every rank; `path` is unchanged.
        """
        options = OutputOptions(dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
        export = saving.Export(self._engine, self.pods, path, files or {}, options, partial(self.origin, which))
        with self.weights(which):
            export.write(progress)

    @in_normal_mode
    def save(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        files: Files | None = None,
        max_shard_size: str | int = "5GB",
    ) -> list[Path]:
        """Write the snapshots as candidates, as `Snapshots` does, and return their directories. Collective.

        Candidates of the same steps are replaced.

        Args:
            directory: contains the candidates, `step-00000100` and so on; on a file system that all ranks share.
            dtype: the type of the floating point tensors in the files; by default, the types of the model.
            files: small files for each candidate.
            max_shard_size: the maximum size of one file's tensors.

        Raises:
            ConfigError, OutputError, TwaError: on every rank.
        """
        with self.pods.agree():
            self._validity.require()
            self._parameters.buffers()
            window = saving.checked(self._window, dtype, files or {}, max_shard_size)
        return saving.save(self._engine, self.pods, window, directory, dtype, files or {}, max_shard_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, which restores the same bits on the same number of ranks.

        The tensors are not copied and hold the part of this rank: save the state of every rank. With FSDP2, averages
        are DTensors: give this object to torch.distributed.checkpoint, which saves the tensors of all ranks and
        reshards exponential averages.
        """
        self._validity.report()
        state = self._state()
        self._saved_versions = checkpoint.versions(state)
        return state

    @in_normal_mode
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict()` returned. Collective. With DeepSpeed, load its checkpoint first.

        Raises:
            StateError: on every rank; the state is damaged, or it has other settings, or it was saved by another rank,
                on another number of ranks, or at another step than those of other ranks.
        """
        try:
            with self.pods.agree():
                self._require_own_weights("load_state_dict()")
                checkpoint.check(state, self._engine, self._ema, self._window)
            checkpoint.require_same_counters(self.pods, state)
        except StateError:
            own_state = self._state()
            if checkpoint.is_live(state, own_state) and checkpoint.versions(own_state) != self._saved_versions:
                self._validity.overwritten()
            raise
        self._step = checkpoint.load(state, self._engine, self._ema, self._window)
        self._recount()
        self._validity.restored()

    @property
    def has_trained_weights(self) -> bool:
        """Whether the model has the weights that are trained, and not those of an average."""
        return not (self._learned or self._showing.has_copy or self.lost)

    def save_state(self, directory: str | Path) -> None:
        """Write the state of each rank to a separate file in `directory`, `averages-00000-of-00008.pt`. Collective.

        Raises:
            OutputError, TwaError: on every rank.
        """
        with self.pods.agree():
            self._validity.require()
            state_file.write_file(self._state(), target_of(directory), self.pods.rank, self.pods.size)

    def load_state(self, directory: str | Path) -> bool:
        """Load the files that `save_state` wrote, and return whether there were any. Collective.

        Raises:
            StateError: on every rank; the files are of another number of ranks, only some ranks see them, or they have
                other settings.
        """
        with self.pods.agree():
            state = state_file.read_file(target_of(directory), self.pods.rank, self.pods.size)
        has_state = self.pods.gather(state is not None)
        if not any(has_state):
            return False
        with self.pods.agree():
            if state is None:
                raise StateError(
                    f"{directory}: rank {self.pods.rank} sees no state of averages there, but rank "
                    f"{has_state.index(True)} does. Each rank needs its own file: put the directory on a file system "
                    "that all ranks share."
                )
        assert state is not None
        self.load_state_dict(state)
        return True

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copies("a RunningAverages")

    @in_normal_mode
    def _state(self) -> dict[str, Any]:
        return checkpoint.state_of(self._engine, self._step, self._ema, self._window, self._validity.why_not)

    def _recount(self) -> None:
        """Continue from the number of steps that the library of the engine has counted, if it counts them."""
        self._counted = self._engine.steps_taken()

    def _require_own_weights(self, action: str) -> None:
        if self._learned:
            raise TwaError(f"{action}: the model holds the average that learn() has made; call restore() first.")
        if self._showing:
            raise TwaError(f"{action} inside weights(): the weights are not those that are trained; leave it first.")
        if self.lost:
            raise TwaError(f"{action}: {self.lost}")
