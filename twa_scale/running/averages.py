"""Averages of the weights of a model while it trains, with any engine and without gathering the weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from twa_scale.average.attach import require_trainable
from twa_scale.average.average import TrainableAverage
from twa_scale.average.coefficients import Which
from twa_scale.average.step_optimizer import refuse_copies
from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.config import TwaConfig
from twa_scale.engines import Engine, choose_engine
from twa_scale.engines.model_checks import require_device, require_materialized
from twa_scale.errors import ConfigError, StateError, TwaError
from twa_scale.output import Files
from twa_scale.output.publish import target_of
from twa_scale.ranks import Pods, require_same_settings
from twa_scale.running import checkpoint, saving, state_file
from twa_scale.running.ema import Ema
from twa_scale.running.intact import Intact
from twa_scale.running.learned import Learned
from twa_scale.running.learning import carried_files, learn, require_snapshots, settings_for
from twa_scale.running.named import mixture, names, origin
from twa_scale.running.parameters import Parameters
from twa_scale.running.repeats import Repeats
from twa_scale.running.scores import Scores
from twa_scale.running.settings import Ema as EmaOption
from twa_scale.running.settings import Window as WindowOption
from twa_scale.running.settings import ema_settings, is_due, window_settings
from twa_scale.running.showing import Showing
from twa_scale.running.window import Window


class RunningAverages:
    """Exponential averages and the last snapshots of a model, held beside each rank's own weights.

    The optimizer stays yours: call `step()` after each of its steps. `weights(which)` shows an average in a `with`
    block, and `learn()` trains the coefficients of the snapshots. What is averaged are the floating point parameters
    that require a gradient when this is made.

    Args:
        model: as for `attach`; make this after the model has been wrapped or sharded.
        ema: decays, as `[0.99, 0.999]`, or settings: `decays`, `half_life` (of the average, as a fraction of the
            updates so far), `bema` (True, or its settings), `update_every` and `start_step` (in steps),
            `bias_correction`, `use_buffers`.
        window: settings: `every` (steps between two snapshots), `keep` (how many), `store` ("packed1" to "packed8",
            "dense16", "dense32": how the difference of two is held), `start_step`.
        device: "auto" holds the averages beside the weights; "cpu" in the host's memory, page-locked for a GPU: a step
            at which something is due then waits for the weights to be copied there.
        replica_group: with pods, as for `attach`.

    Raises:
        ConfigError, EngineError: on every rank.
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
            own = self._parameters.buffers() if self.pods.rank == 0 else {}  # statistics differ between ranks
            self._window: Window | None = None
            self._ema = None if of_ema is None else Ema(of_ema, live, own, self._parameters.allocate)
            if of_window is not None:
                self._window = Window(of_window, live, own, self._engine.device, device)
        self._step = 0
        self._counted: int | None = self._engine.steps_taken()
        held_on = torch.device("cpu") if device == "cpu" else None
        self._showing = Showing(self._engine, self.pods, self._parameters, self._ema, self._window, held_on)
        self._learned = Learned(self._engine, self._showing, self._recount)
        self._repeats = Repeats()
        self._intact = Intact()
        self._saved_versions: list[int] = []
        self._parameters.report_wrapper()

    @property
    def num_steps(self) -> int:
        """Steps that have been counted."""
        return self._step

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps of the snapshots in the window, oldest first."""
        return list(self._window.steps) if self._window else []

    @property
    def names(self) -> list[str]:
        """Averages that `weights` can show now, in addition to indices of snapshots and coefficients."""
        return names(self._ema, self._window)

    @property
    def lost(self) -> str:
        """Why the model no longer holds the trained weights, after an error on some ranks; empty while it does."""
        return self._showing.lost

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds beside its weights; while other weights are shown, a copy of these comes to it."""
        return sum(part.nbytes for part in (self._ema, self._window) if part) + self._showing.nbytes

    @in_normal_mode
    def step(self) -> None:
        """Count a step of the optimizer, and update what is due. Not collective; on a GPU the host does not wait.

        Call it after each step of the optimizer. With DeepSpeed it may follow each micro-batch: its own count of steps
        decides.

        Raises:
            TwaError: the model holds other weights than those that are trained, or an update has been interrupted.
            EngineError: a parameter or a buffer that was replaced by another.
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
        """Update what is due at `step`. What fails before the first write leaves everything as it was."""
        self._intact.require()
        versions, live = self._parameters.versions(), self._parameters.live()
        buffers = self._parameters.buffers() if window or (ema and ema.settings.use_buffers) else {}
        with self._intact.writing():
            if ema:
                ema.update(live, buffers)
            if window:
                window.take(step, live, buffers)
        if self._counted is None:  # else the library's own count tells steps apart
            self._repeats.check(versions, live, report=self.pods.rank == 0)
        self._parameters.report_wrapper()

    @contextmanager
    def weights(self, which: Which) -> Iterator[None]:
        """Show the model with an average in a `with` block, then restore its weights and buffers. Collective.

        Within the block this rank keeps a copy of its weights. What is written into them there is undone, which is
        reported. Buffers stay as they are, but for an average with `use_buffers`, which shows those of the first rank:
        measure BatchNorm statistics anew where the model has them.

        Args:
            which: "last", the weights that training has reached; "ema", or "ema:0.999", "ema:half-life:0.05" of
                several; "bema"; of the snapshots "mean", "linear", "minus-sqrt", "lawa:8" (the mean of at most the last
                8), an index, n coefficients of any sum, or "window:NAME" with a name that the setting `center` takes.

        Raises:
            ConfigError: a name that is unknown or not kept.
            TwaError: the average has no update or snapshot yet; its weights are not finite; a backward pass ran inside
                the block.
            RankError: another rank has left the block by an error: nothing is restored.
        """
        if self._learned:
            self._require_own_weights("weights()")
        with self._showing.weights(which, self._intact.require):
            yield

    def has(self, which: Which) -> bool:
        """Return whether an average can be shown yet: after its first update, or its first snapshot.

        Raises:
            ConfigError: a name that is unknown or not kept.
        """
        try:
            mixture(which, self._ema, self._window)
        except ConfigError:
            raise
        except TwaError:
            return False
        return True

    def origin(self, which: Which) -> dict[str, Any]:
        """Return the provenance of an average, for twa_scale.json and the model card beside a file of it.

        Raises:
            ConfigError, TwaError: as `weights` does.
        """
        return origin(which, self._step, self._ema, self._window)

    def compare(self, score: Callable[[nn.Module], float], which: Sequence[Which] | None = None) -> Scores:
        """Return the scores of several averages, each shown in turn. Collective.

        Args:
            score: called on every rank with the model, which then holds an average; returns a number.
            which: as for `weights`; `names` when not given.

        Returns:
            The numbers by name, which prints as a table. A name that is given again has a number, as "mean (2)".
        """
        scores = Scores()
        for one in self.names if which is None else which:
            with self.weights(one):
                scores.add(str(one), float(score(self._engine.module)))
        return scores

    def check_learn(self, config: TwaConfig | Mapping[str, Any] | None = None) -> None:
        """Refuse, before training, settings that `learn` refuses whatever the snapshots are. Collective.

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
        """Put a trainable average of the snapshots into the model, as `attach` does of candidates. Collective.

        The window is its store. This rank keeps a copy of its weights, which `restore` gives back; until then training
        cannot continue.

        Args:
            config: as for `attach`, without `store`, `store_device` and `coding`, which are the window's.
            files: small files that `export` of the average puts beside the weights, as for `Snapshots`.

        Raises:
            ConfigError, EngineError, TwaError: on every rank.
        """
        with self.pods.agree():
            self._require_own_weights("learn()")
            self._intact.require()
            self._parameters.versions()
            self._parameters.report_newly_trained()
            window = require_snapshots(self._window)
            settings = settings_for(window, config, self._device)
            carried = carried_files(files or {})
            window.require_finite()
            buffers = self._parameters.buffers()

        def make() -> TrainableAverage:
            engine = choose_engine(self._model, self._replica_group)
            return learn(engine, self.pods, window, settings, carried)

        return self._learned.start(make, buffers)

    @contextmanager
    def learning(
        self, config: TwaConfig | Mapping[str, Any] | None = None, *, files: Files | None = None
    ) -> Iterator[TrainableAverage]:
        """Call `learn` for a `with` block and `restore` at its end, also where an error leaves it. Collective.

        Raises:
            ConfigError, EngineError, TwaError: as `learn`.
            RankError: another rank has left the block by an error: nothing is restored.
        """
        twa = self.learn(config, files=files)
        with self._learned.restoring():
            yield twa

    def restore(self) -> None:
        """Close the average that `learn` has made, and give the model its weights and buffers back. Collective.

        DeepSpeed's counts of steps and samples, and its loss scale, become what they were, too. Does nothing where
        `learn` has not been called.

        Raises:
            TwaError: the ranks cannot restore the weights together any more.
        """
        self._learned.restore()

    def save(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        files: Files | None = None,
        max_shard_size: str | int = "5GB",
    ) -> list[Path]:
        """Write the snapshots as candidates, as `Snapshots` does, and return their directories. Collective.

        Args:
            directory: gets `step-00000100` and so on; the same file system on every rank.
            dtype: type of the floating point tensors in the files; the model's own when not given.
            files: small files for each candidate.
            max_shard_size: most bytes in one file.

        Raises:
            ConfigError, OutputError, TwaError: on every rank.
        """
        with self.pods.agree():
            self._intact.require()
            self._parameters.buffers()
            window = saving.checked(self._window, dtype, files or {}, max_shard_size)
        return saving.save(self._engine, self.pods, window, directory, dtype, files or {}, max_shard_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on, with the same bits on the same number of ranks.

        Tensors are live, and this rank's own: save the state of every rank. Under FSDP2 averages are DTensors: give
        this object to torch.distributed.checkpoint, which saves all ranks' tensors and reshards exponential averages.
        """
        self._intact.report()
        state = self._state()
        self._saved_versions = checkpoint.versions(state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Collective. With DeepSpeed load its own checkpoint before.

        Raises:
            StateError: on every rank; a state that is damaged, or of other settings, of another rank, of another number
                of ranks, or of another step than other ranks'.
        """
        try:
            with self.pods.agree():
                self._require_own_weights("load_state_dict()")
                checkpoint.check(state, self._engine, self._ema, self._window)
            checkpoint.require_same_counters(self.pods, state)
        except StateError:
            own = self._state()
            if checkpoint.is_live(state, own) and checkpoint.versions(own) != self._saved_versions:
                self._intact.overwritten()
            raise
        self._step = checkpoint.load(state, self._engine, self._ema, self._window)
        self._recount()
        self._intact.restored()

    def save_state(self, directory: str | Path) -> None:
        """Write each rank's state to a file of its own in `directory`, `averages-00000-of-00008.pt`. Collective.

        Raises:
            OutputError, TwaError: on every rank.
        """
        with self.pods.agree():
            self._intact.require()
            state_file.write_file(self._state(), target_of(directory), self.pods.rank, self.pods.size)

    def load_state(self, directory: str | Path) -> bool:
        """Go on from what `save_state` has written, and return whether there was anything. Collective.

        Raises:
            StateError: on every rank; files of another number of ranks, or of other settings.
        """
        with self.pods.agree():
            state = state_file.read_file(target_of(directory), self.pods.rank, self.pods.size)
        if not all(self.pods.gather(state is not None)):
            return False
        assert state is not None
        self.load_state_dict(state)
        return True

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copies("a RunningAverages")

    def _state(self) -> dict[str, Any]:
        return checkpoint.state_of(self._engine, self._step, self._ema, self._window, self._intact.why_not)

    def _recount(self) -> None:
        """Continue from the number of steps that the library of the engine has counted, if it counts them."""
        self._counted = self._engine.steps_taken()

    def _require_own_weights(self, what: str) -> None:
        if self._learned:
            raise TwaError(f"{what}: the model holds the average that learn() has made; call restore() first.")
        if self._showing:
            raise TwaError(f"{what} inside weights(): the weights are not those that are trained; leave it first.")
        if self.lost:
            raise TwaError(f"{what}: {self.lost}")
