"""A search for good settings with Optuna: `dalle train -m hparams_search=optuna`.

Trials are jobs as those of a sweep (dalle.launch.sweeps), one after another, with what Optuna's TPE sampler
proposes after those before (Bergstra et al. 2011). The study is a file, `study.db`: started again, the
search finishes the trial that was in the middle and goes on.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dalle.errors import UserError
from dalle.files import explained
from dalle.launch.overrides import quote, written
from dalle.launch.processes import STOPPED
from dalle.launch.sweeps import Job, close, perform
from dalle.ranges import PositiveInt, Seed, Text
from dalle.run_dir import Run
from dalle.run_lock import only_one


class Search:
    """Looks for the settings in `space` that bring `metric` to its optimum.

    Args:
        folder: where ``study.db`` and ``sweep.csv`` are kept.
        metric: one of those in a run's manifest.
        trials: how many in all, failed ones and those of earlier starts included.
        space: for each setting (``optimizer.lr``) a list of choices, or ``low`` and ``high``, whole numbers
            where both are, with ``log: true`` or ``step:`` if wanted.
    """

    def __init__(
        self,
        folder: Text,
        metric: Text,
        direction: Literal["minimize", "maximize"],
        trials: PositiveInt,
        seed: Seed,
        space: dict[str, Any],
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError(
                "hparams_search=optuna needs the optuna package: pip install 'dalle[sweeps]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.metric = Path(folder), metric
        self.direction: Any = direction
        self.trials, self.seed = trials, seed
        if not space:
            raise UserError("search.space is empty: name the settings to be searched")
        self.space = {key: self._distribution(optuna, key, values) for key, values in space.items()}
        self.optuna = optuna

    def run(self, run: Path, command: list[str], words: list[str], overwrite: bool) -> int:
        """Does all trials, in directories below `run`, and shows what came of them.

        Each is `command` with `words` and settings of its own; what the words say of the search and of
        directories is not for the trials.

        Returns: an exit code: 0 when all trials have been made.

        Raises:
            UserError: the finished trials have no such metric, the study was made with another space,
                or its file cannot be written.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        kept = [w for w in words if not w.lstrip("+~").startswith(("hparams_search", "search.", "paths.run"))]
        with only_one(self.folder / "study"), self.storage_explained():
            study = self.study(str(run), overwrite)
            stopped = False
            for number, settings in self.proposals(study):
                place = run / f"trial-{number:03d}"
                own = [f"{key}={written(value)}" for key, value in settings.items()]
                print(f"trial {number}: {' '.join(own)}", flush=True)
                given = [*kept, *own, f"paths.run={quote(str(place))}"]
                job = Job(place, command, given, overwrite=overwrite)
                if (state := perform(job)) == STOPPED:
                    stopped = True
                    break
                self.tell(study, number, job, state)
            close(self.folder, self.metric)
            if self.completed(study):
                best = study.best_trial
                print(f"best: {self.metric} {best.value:.4g} in {run / f'trial-{best.number:03d}'}")
        return int(stopped or not self.completed(study))

    @contextmanager
    def storage_explained(self) -> Iterator[None]:
        """Turns what SQLite says of a full disk, a read-only one, or a damaged file into one line.

        Trials that are done are known by their runs: the search takes them from there when it goes on.
        """
        from sqlalchemy.exc import SQLAlchemyError  # optuna brings it

        try:
            yield
        except (SQLAlchemyError, self.optuna.exceptions.StorageInternalError) as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
            reason = " ".join(str(getattr(cause, "orig", None) or cause or error).split())[:200]
            raise UserError(
                f"{self.folder / 'study.db'} cannot be read or written ({reason}); its runs are kept: once "
                "that is mended, the same command goes on"
            ) from error

    def study(self, name: str, overwrite: bool) -> Any:
        storage = f"sqlite:///{self.folder / 'study.db'}"
        if overwrite and name in self.optuna.get_all_study_names(storage):
            self.optuna.delete_study(study_name=name, storage=storage)
        study = self.optuna.create_study(
            study_name=name, storage=storage, direction=self.direction, load_if_exists=True
        )
        goal, old = f"{self.direction} {self.metric}", study.direction.name.lower()
        begun = study.user_attrs.get("goal", old)
        if old != self.direction or begun not in (old, goal):
            raise UserError(
                f"{self.folder / 'study.db'} was begun to {begun}, not to {goal}; "
                "give name=other, or overwrite=true"
            )
        study.set_user_attr("goal", goal)
        # with the same seed, the first proposals of a study that goes on would be those it began with
        study.sampler = self.optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        return study

    def proposals(self, study: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and settings of each trial that is still to be made: first those in the middle."""
        state = self.optuna.trial.TrialState
        for trial in study.get_trials(states=(state.RUNNING,)):
            if self.whole(trial):
                yield trial.number, trial.params
            else:
                study.tell(trial.number, state=state.FAIL)
        while (
            sum(t.state != state.FAIL or self.whole(t) for t in study.get_trials(deepcopy=False))
            < self.trials
        ):
            try:
                trial = study.ask(self.space)
            except ValueError as error:
                raise UserError(
                    f"search.space has changed since {self.folder / 'study.db'} was begun ({error}); "
                    "give name=other, or overwrite=true"
                ) from None
            yield trial.number, trial.params

    def whole(self, trial: Any) -> bool:
        """Whether all settings of a trial were written down: a disk may have been full amid them."""
        return self.space.keys() <= trial.params.keys()

    def tell(self, study: Any, number: int, job: Job, state: str) -> None:
        """Tells the study what came of a trial; a metric that is not finite is a failure."""
        if state == "finished":
            metrics = Run(job.run).manifest("metrics")["metrics"]
            if self.metric not in metrics:
                raise UserError(f"there is no search.metric={self.metric}; there are {', '.join(metrics)}")
            value = metrics[self.metric]
            value = math.nan if value is None else value  # JSON has no other word for it
            if math.isfinite(value):
                study.tell(number, value)
                return
            job.note("failed", f"{self.metric} is no number")
        study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def completed(self, study: Any) -> list[Any]:
        return study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))

    def _distribution(self, optuna: Any, key: str, values: Any) -> Any:
        kinds = optuna.distributions
        try:
            if isinstance(values, list):
                return kinds.CategoricalDistribution(values)
            whole = isinstance(values["low"], int) and isinstance(values["high"], int)
            return (kinds.IntDistribution if whole else kinds.FloatDistribution)(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"search.space.{key}={values} is neither a list nor low and high ({error})"
            ) from None
