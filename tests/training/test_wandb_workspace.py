"""Panels are those of what stages really log, whoever shows them."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from tiny import NETS, train, without_account
from webpage import parts_of

from dalle.errors import UserError
from dalle.evaluation import dashboard
from dalle.evaluation.page import thinned
from dalle.metrics.perceptual import RandomFeatures
from dalle.training import dashboard_spec, wandb_workspace

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def logs(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    return tmp_path / "logs"


def test_every_stage_has_panels():
    assert dashboard_spec.STAGES.keys() == dashboard_spec.PICTURES.keys() == NETS.keys() - {"dit"}


@pytest.mark.parametrize("stage", sorted(dashboard_spec.STAGES))
def test_panels_show_what_a_stage_logs(logs, stage):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    # Enough pictures for everything: a distance of reconstructions, and what few captions mention
    enough = RandomFeatures.num_features + 1 if "reconstructions" in dashboard_spec.PICTURES[stage] else 8
    items = (f"datamodule.val_items={enough}", "datamodule.test_items=64", "data.size=512")
    more = (
        ("callbacks.generation.items=64",) if "test/verdicts_sheet" in dashboard_spec.PICTURES[stage] else ()
    )
    options = (
        *items,
        *more,
        "trainer.val_check_interval=2",
        "logger=[tensorboard]",
        f"paths.run='{logs}/run'",
    )
    run = train(stage, logs, *options)
    logged = run.metrics()
    for title, metrics in {**dashboard_spec.ALWAYS, **dashboard_spec.STAGES[stage]}.items():
        for metric in metrics:
            assert dashboard_spec.matching(metric, logged), f"{stage} logs no {metric} for {title!r}"
    events = tensorboard.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == set(dashboard_spec.PICTURES[stage])
    (layout,) = events.Tensors("custom_scalars__config__")
    charts = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category[0].chart
    shown = {chart.title: tuple(chart.multiline.tag) for chart in charts}
    assert shown == {
        t: tuple(map(dashboard_spec.pattern, ms)) for t, ms in dashboard_spec.panels(stage).items()
    }


def charts(made) -> list[dict]:
    """All panels of a workspace, as they are sent to W&B."""
    sections = made._to_model().model_dump(by_alias=True)["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


@pytest.mark.parametrize("stage", [*sorted(dashboard_spec.STAGES), "mine"])
def test_a_workspace_has_the_panels_of_a_stage(stage):
    configs = [chart["config"] for chart in charts(wandb_workspace.workspace("me", "dalle", stage))]
    shown = {c["chartTitle"]: c for c in configs if c.get("chartTitle")}
    for title, metrics in dashboard_spec.panels(stage).items():
        chart = shown[title]
        if regex := chart.get("metricRegex"):
            assert regex == "|".join(map(dashboard_spec.pattern, metrics))
        else:
            assert chart["metrics"] == list(metrics)
    media = [key for c in configs for key in c.get("mediaKeys") or ()]
    assert tuple(media) == dashboard_spec.PICTURES.get(stage, ())


def test_names_with_stars():
    names = ["train/loss", "train/loss_t0.00-0.25", "train/loss_t0.25-0.50", "lr-AdamW/pg1"]
    assert dashboard_spec.matching("train/loss", names) == ["train/loss"]
    assert dashboard_spec.matching("train/loss_t*", names) == names[1:3]
    assert dashboard_spec.matching("lr-*", names) == names[3:]
    assert dashboard_spec.matching("train.loss", names) == []


class Api:
    """A project with a CLIP, and a prior made from it."""

    def __init__(self):
        self.said = []

    def runs(self, path):
        assert path == "me/dalle"
        clip = SimpleNamespace(name="default-clip", config={"stage": "clip"})
        prior = SimpleNamespace(name="default-prior", config={"stage": "prior", "uses": ["default-clip:abc"]})
        lost = SimpleNamespace(name="other-prior", config={"stage": "prior", "uses": ["other-clip:abc"]})
        for run in (clip, prior, lost):
            run.use_artifact = lambda artifact, run=run: self.said.append((run.name, artifact))
        return [clip, prior, lost]

    def artifact(self, name):
        if "other" in name:
            raise ValueError("no such artifact")
        return name


def command(monkeypatch, module, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m", *arguments])
    module.main()


def test_views_and_lineage_of_a_project(monkeypatch, capsys):
    api, saved = Api(), []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.Api", lambda: api)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", lambda made: saved.append(made.name))
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.url", "https://wandb.example/view")
    command(monkeypatch, wandb_workspace, "me/dalle")
    assert saved == ["dalle: clip", "dalle: prior"]
    assert api.said == [("default-prior", "me/dalle/default-clip:abc")]
    out = capsys.readouterr().out
    assert "other-prior was made from other-clip:abc, which is not in me/dalle" in out
    assert "prior: https://wandb.example/view" in out


def test_without_an_account_there_is_the_dashboard(monkeypatch, tmp_path):
    without_account(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"no account is set up here: wandb login; .*dalle dashboard"):
        command(monkeypatch, wandb_workspace, "me/dalle")
    with pytest.raises(UserError, match="ENTITY/PROJECT"):
        command(monkeypatch, wandb_workspace, "dalle")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'dalle\[wandb\]'"):
        command(monkeypatch, wandb_workspace, "me/dalle")


def test_a_dashboard_needs_nothing_but_itself(logs, monkeypatch, capsys):
    options = ("trainer.val_check_interval=2", "callbacks.grid.every=2")
    finished = train("decoder", logs, f"paths.run='{logs}/mine/decoder/a<b'", *options, steps=12)
    stopped = train("decoder", logs, f"paths.run='{logs}/mine/decoder/stopped'", *options)
    (stopped.path / "manifest.json").unlink()
    command(monkeypatch, dashboard, str(logs / "mine"))
    page = logs / "mine" / "dashboard.html"
    assert str(page) in capsys.readouterr().out
    charts, text = parts_of(page.read_text())
    assert text.count("<img") - 1 == text.count('src="data:image/png;base64,')  # and that of the enlarged one
    assert "://" not in text
    assert "decoder/a<b" not in text
    titles = [chart["title"] for chart in charts]
    for title in ("Loss", "Loss by diffusion time", "The judge, by attribute", "Processor cores kept busy"):
        assert titles.count(title) == 1
    assert "GPU memory, GB at most" not in titles
    loss = charts[titles.index("Loss")]["data"]
    assert {trace["name"] for trace in loss if trace["meta"] == 0} == {
        "decoder/a&lt;b train/loss", "decoder/a&lt;b val/loss",
    }  # fmt: skip
    assert [(t["x"], t["y"]) for t in loss if t["name"] == "decoder/a&lt;b val/loss"] == [
        thinned(finished.metrics()["val/loss"])
    ]
    shown = [f"step-{n:07d}" for n in (2, 6, 8, 12)]  # of six, evenly
    assert [text.count(f'alt="{name}"') for name in shown] == [2, 1, 1, 1]
    assert text.count('alt="test"') == 2
    assert f"<td>{finished.manifest()['parameters']:,}</td>" in text
    assert finished.manifest()["clip"]["weights"] in text
    assert "<td>not finished</td>" in text


def test_a_folder_without_runs_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="holds no runs"):
        command(monkeypatch, dashboard, str(tmp_path))
