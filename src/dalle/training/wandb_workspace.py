"""Workspaces at W&B as code: for each stage that a project has runs of, a saved view of those runs with
the panels of `dalle.training.dashboard_spec`.

It also completes the lineage of runs that were offline and have been uploaded since (`wandb sync`): each is
said to use the weights that its configuration names.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from dalle.errors import UserError, Words
from dalle.training.dashboard_spec import PICTURES, is_curve, panels, pattern
from dalle.training.loggers import has_account

TABLE = "test/verdicts"
STEP = "trainer/global_step"


def workspace(entity: str, project: str, stage: str) -> Any:
    """The view of one stage's runs, not yet saved: curves and numbers, then pictures and verdicts."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=stage, panels=charts(stage), is_open=True)]
    if shown := pictures(stage):
        sections.append(ws.Section(name=f"{stage}: pictures", panels=shown, is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"dalle: {stage}",
        sections=sections,
        runset_settings=ws.RunsetSettings(filters=[expr.Config("stage") == stage]),
    )


def charts(stage: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    made: list[Any] = []
    for title, metrics in panels(stage).items():
        if any("*" in metric for metric in metrics):
            regex = "|".join(map(pattern, metrics))
            made.append(wr.LinePlot(title=title, x=STEP, metric_regex=regex))
        elif is_curve(metrics):
            made.append(wr.LinePlot(title=title, x=STEP, y=list(metrics)))
        else:
            made.append(wr.BarPlot(title=title, metrics=list(metrics)))
    return made


def pictures(stage: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    keys = PICTURES.get(stage, ())
    made: list[Any] = [wr.MediaBrowser(title=key, media_keys=[key]) for key in keys]
    return [*made, wr.WeavePanelSummaryTable(table_name=TABLE)] if f"{TABLE}_sheet" in keys else made


def complete_lineage(api: Any, project: str, runs: Iterable[Any]) -> None:
    """Says of every run which artifacts it used; to W&B, saying so again changes nothing."""
    from wandb.errors import Error

    for run in runs:
        for name in run.config.get("uses", []):
            try:
                run.use_artifact(api.artifact(f"{project}/{name}"))
            except (ValueError, Error) as error:
                print(f"{run.name} was made from {name}, which is not in {project} ({error})")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Words(prog="dalle workspace", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("project", help="ENTITY/PROJECT at W&B")
    path = parser.parse_args(arguments).project
    entity, _, project = path.partition("/")
    if not entity or not project:
        raise UserError(f"{path}: give a project at W&B as ENTITY/PROJECT")
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise UserError("workspaces need the wandb packages: pip install 'dalle[wandb]'") from None
    if not has_account():
        raise UserError(
            "workspaces are made at W&B, and no account is set up here: wandb login; without one, "
            "dalle dashboard logs/NAME shows the same panels"
        )
    try:
        api = wandb.Api()
        runs = list(api.runs(path))
    except (ValueError, wandb.Error) as error:
        raise UserError(f"{path} cannot be read at W&B: {error}") from None
    complete_lineage(api, path, runs)
    for stage in sorted({run.config["stage"] for run in runs if "stage" in run.config}):
        made = workspace(entity, project, stage)
        made.save()
        print(f"{stage}: {made.url}")
