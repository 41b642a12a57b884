"""Every file of conf/ composes and makes what it says; paper sizes are those of the papers."""

import inspect
from pathlib import Path

import lightning
import pytest
import torch
from conftest import untrained
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from tiny import ROOT, configure

from dalle.diffusion.samplers import Sampler
from dalle.errors import UserError
from dalle.instantiate import check, instantiate
from dalle.run_dir import Run
from dalle.training.defaults import fill_sizes, nodes
from dalle.training.fit import check_machine, make_trainer, prepare
from dalle.training.preflight import count
from dalle.trust import composed

CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))


USES_DATA = {  # batches -> a model that trains on them
    "images": "dvae", "text_images": "clip", "codes": "dalle", "embeddings": "prior",
    "image_embeddings": "gan", "embedding_codes": "ar_prior", "upsampling": "upsampler",
}  # fmt: skip


def files_of(group: str) -> list[str]:
    return [name.rsplit("/", 1)[1] for name in FILES if name.rsplit("/", 1)[0] == group]


def model_of(net: str) -> str:
    """The model that has a choice of networks, of which this is one."""
    return {"gpt": "dalle", "llama": "dalle", "upsampler_unet": "upsampler"}.get(net, "decoder")


def config_of(*overrides: str, primary: str = "train") -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(primary, list(overrides))
    for place in config.get("data") or ():
        if OmegaConf.is_missing(config.data, place):
            config.data[place] = "PICTURES"
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain


def command_of(file: str) -> tuple[str, list[str]]:
    """The primary config and the overrides that use a file of conf/."""
    group, _, name = file.rpartition("/")
    if not group:
        return name, []
    if group == "experiment/stage":
        fitting = [some for some in files_of("experiment") if name.startswith(f"{some}_")]
        assert fitting, f"{file} is never used"
        experiment = max(fitting, key=len)
        model = name.removeprefix(f"{experiment}_")
        return "train", [f"experiment={experiment}", f"model={model}"]
    if group == "hparams_search/stage":
        search, model = name.split("_", 1)
        assert search in files_of("hparams_search"), f"{file} is never used"
        return "train", [f"hparams_search={search}", f"model={model}"]
    if group == "model/net":
        return "train", [f"model={model_of(name)}", f"model/net={name}"]
    if group == "model/datamodule":
        return "train", [f"model={USES_DATA[name]}"]
    if group == "data/files":
        return "train", ["data=folder"]
    if group in ("pipeline", "paths", "debug"):
        return "sample", [f"{group}={name}"]
    return "train", [f"{group}={name}"]


def check_all(config: dict) -> None:
    for key in ("datamodule", "model", "callbacks", "logger"):
        check(config[key], key)
    check({"_target_": "lightning.Trainer", **config["trainer"]}, "trainer")


@pytest.mark.parametrize("primary", ["train", "sample", "evaluate", "encode"])
def test_no_setting_has_the_name_of_a_group_that_is_not_used(primary):
    """`key=value` chooses a file of the folder conf/key, if there is one, whatever the setting `key` says."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{primary}.yaml"))
    assert isinstance(config, dict)
    chosen = {group for entry in config.pop("defaults") if isinstance(entry, dict) for group in entry}
    assert not {key for key in config if (CONF / key).is_dir()} - chosen


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("hydra/")])
def test_composes(file):
    primary, overrides = command_of(file)
    config = config_of(*overrides, primary=primary)
    if primary == "train":
        check_all(config)


@pytest.mark.parametrize(
    "model", ["clip", "prior", "ar_prior", "decoder", "dvae", "dalle", "gan", "upsampler"]
)
def test_groups_switch_freely(model):
    """Every choice of every group under every model, several groups at a time."""
    groups = ("debug", "optimizer", "precision", "trainer", "sampler", "data", "callbacks", "image_tokenizer")
    choices = {group: files_of(group) for group in groups}
    for k in range(max(map(len, choices.values()))):
        picked = [f"{group}={names[k % len(names)]}" for group, names in choices.items()]
        check_all(config_of(f"model={model}", *picked))


def test_a_sweep_gives_every_job_a_directory_of_its_own():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra=sweep", "model=prior", "optimizer.lr=1e-4", "name=x", "hydra.job.num=0"]
        config = compose("train", overrides, return_hydra_config=True)
    excluded = config.hydra.job.config.override_dirname.exclude_keys
    assert {"model", "name", "resume", "overwrite"} <= set(excluded)
    assert "override_dirname" in OmegaConf.to_container(config)["paths"]["run"]


def test_trainer_has_every_argument_of_lightnings():
    arguments = set(inspect.signature(lightning.Trainer).parameters)
    listed = set(OmegaConf.load(CONF / "trainer" / "auto.yaml"))
    assert listed == arguments - {"callbacks", "logger", "default_root_dir"}


LIGHTNINGS = {  # its own default of what we choose otherwise
    "devices": "auto", "precision": None, "max_epochs": None, "max_steps": -1, "val_check_interval": None,
    "check_val_every_n_epoch": 1, "num_sanity_val_steps": None, "log_every_n_steps": None,
    "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None,
    "gradient_clip_val": None, "gradient_clip_algorithm": None, "use_distributed_sampler": True,
    "enable_autolog_hparams": True,
}  # fmt: skip


def test_a_default_of_lightnings_trainer_that_changes_is_noticed():
    """All but those above are restated: look at what has changed, then restate it or choose."""
    ours = OmegaConf.to_container(OmegaConf.load(CONF / "trainer" / "auto.yaml"))
    parameters = inspect.signature(lightning.Trainer).parameters
    assert {name: parameters[name].default for name in ours} == {**ours, **LIGHTNINGS}


def with_its_own_defaults(file: str) -> DictConfig:
    """A file of conf/ over those of its group that it begins with."""
    config = OmegaConf.load(CONF / f"{file}.yaml")
    assert isinstance(config, DictConfig)
    for entry in config.pop("defaults", []):
        pairs = [("", entry)] if isinstance(entry, str) else entry.items()
        bases = [name.split("@")[0] for group, name in pairs if not group and name != "_self_"]
        bases += [f"{group.split('@')[0]}/{name}" for group, name in pairs if group.endswith("@_here_")]
        for base in bases:
            config = OmegaConf.merge(with_its_own_defaults(f"{file.rpartition('/')[0]}/{base}"), config)
            assert isinstance(config, DictConfig)
    return config


def values_of_conf() -> list[tuple[str, str, str, object]]:
    """What files of conf/ give to classes of ours: (file, class path, argument, value). The files that
    train.yaml chooses come first, then presets after what they are made from.
    """
    chosen = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml").defaults)
    first = [f"{g}/{name}" for entry in chosen if not isinstance(entry, str) for g, name in entry.items()]
    found = []
    for file in sorted((f for f in FILES if "/" in f), key=lambda file: (file not in first, file)):
        for node in nodes(OmegaConf.to_container(with_its_own_defaults(file))):
            if (target := str(node.get("_target_", ""))).startswith("dalle."):
                found += [(file, target, key, value) for key, value in node.items() if key[0] != "_"]
    return found


def test_a_default_lives_in_one_place():
    """What a file of conf/ says, a signature says too, or it has no default. Where several files build one
    class, the first choice counts and the others are presets; `auto` has no other default beside it.
    """
    seen, differ = {}, []
    for file, target, key, value in values_of_conf():
        parameter = inspect.signature(composed(target)).parameters.get(key)
        referred = isinstance(value, dict) or "${" in str(value)
        if seen.setdefault((target, key), file) != file or parameter is None or referred:
            continue
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        if default is not parameter.empty and (default, type(default)) != (value, type(value)):
            differ.append(f"{file}.yaml: {key}={value}, but {target} has {default}")
    assert not differ, "\n".join(differ)
    assert len(seen) > 150


def test_a_net_with_other_options_than_the_preset_is_refused():
    with pytest.raises(
        UserError, match=r"model.net.multipliers is not an option of DiT; it takes image_size"
    ):
        check_all(config_of("model=decoder_paper", "model/net=dit"))


PAPER = [name for name in files_of("model") if name.endswith(("_paper", "_1b"))]  # test_paper_presets.py
CHOICE = ("decoder", "dalle")
LAPTOP = [(name, None) for name in files_of("model") if name not in PAPER and name not in CHOICE]
LAPTOP += [(model_of(net), net) for net in files_of("model/net")]


@pytest.mark.parametrize(("model", "net"), LAPTOP)
def test_laptop_sizes(untrained_stages, tmp_path, model, net):
    """At their real size, on the sizes that data and CLIP have."""
    upstream = [f"upstream.{name}='{untrained_stages / 'default' / name}'" for name in ("clip", "dvae")]
    size = 16 if model == "dalle" else 32  # that of the dVAE
    cache = f"paths.cache='{tmp_path}'"  # of the embeddings that an ar_prior's codes are fitted on
    small = ("data.size=64", f"data.image_size={size}", "trainer=cpu", cache)
    config = config_of(f"model={model}", *upstream, *small, *([f"model/net={net}"] if net else []))
    wanted = {key for key, value in config["model"]["net"].items() if value == "auto"}
    assert wanted
    datamodule, _ = prepare(config, Run(Path(config["paths"]["run"])))
    net_sizes = config["model"]["net"]
    assert "auto" not in net_sizes.values()
    said = wanted & datamodule.sizes.keys()
    assert said
    assert {key: net_sizes[key] for key in said} == {key: datamodule.sizes[key] for key in said}
    stage = instantiate(config["model"], "model")
    assert count(stage.net) < 6e6  # a laptop trains it in minutes


def test_a_size_that_the_data_does_not_have_is_refused(untrained_stages):
    config = configure("clip", untrained_stages, "model.net.image_size=24")
    with pytest.raises(UserError, match=r"model.net.image_size=24 does not fit the data, which has 16"):
        fill_sizes(config, {"image_size": 16, "vocab_size": 300, "context_length": 8})
    config["model"]["net"]["image_size"] = "auto"
    with pytest.raises(UserError, match=r"model.net.image_size=auto, but the data does not say it"):
        fill_sizes(config, {})


def test_codes_need_not_share_their_digits():
    sizes = {"image_vocab": 60, "image_levels": [3, 5, 4]}
    for given, filled in (("auto", [3, 5, 4]), (None, None)):
        net = {"image_vocab": "auto", "image_levels": given}
        fill_sizes({"model": {"net": net}}, sizes)
        assert net == {"image_vocab": 60, "image_levels": filled}


@pytest.mark.parametrize("name", files_of("sampler"))
def test_samplers(name):
    sampler = instantiate(config_of(f"sampler={name}")["sampler"], "sampler")
    assert isinstance(sampler, Sampler)
    assert sampler.method == name


@pytest.mark.parametrize("name", files_of("optimizer"))
def test_optimizers(name):
    recipe = instantiate(config_of(f"optimizer={name}", "model=prior")["optimizer"], "optimizer")
    net = torch.nn.Linear(3, 2)
    optimizer, schedule = recipe.build(net, 1000)
    before = net.weight.detach().clone()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    assert type(optimizer).__name__.lower() == name.replace("_", "")
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("group", ["trainer", "precision", "callbacks", "logger"])
def test_trainers(group, tmp_path):
    """Every choice makes a real Trainer, or says what the machine lacks."""
    for name in files_of(group):
        extra = [] if group == "trainer" else ["trainer=cpu"]
        config = config_of(f"{group}={name}", f"paths.logs='{tmp_path}'", "trainer.max_steps=7", *extra)
        if name == "gpu" and not torch.cuda.is_available():
            with pytest.raises(UserError, match="PyTorch sees none"):
                check_machine(config)
            continue
        check_machine(config)
        trainer = make_trainer(config, Run(tmp_path))
        made = {type(callback).__name__ for callback in trainer.callbacks}
        assert "LastCheckpoint" in made
        assert ("Ema" in made) == (name != "none")
        assert trainer.max_steps == config["trainer"]["max_steps"]


@pytest.mark.parametrize("model", ["prior", "decoder_paper", "dvae"])
def test_shards_change_nothing_but_the_strategy(tmp_path, model):
    words = (f"model={model}", f"paths.logs='{tmp_path}'")
    config, other = config_of("trainer=fsdp", *words), config_of("trainer=ddp", *words)
    check_all(config)
    assert (config["trainer"].pop("strategy"), other["trainer"].pop("strategy")) == ("fsdp2", "ddp")
    assert config == other


def test_sources_of_ones_own_pictures(tmp_path):
    from PIL import Image

    for k in range(4):
        folder = tmp_path / "red things"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 16), (200, 10 * k, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"number {k}\n")
    for name in ("folder", "imagefolder"):
        config = config_of("model=clip", f"data={name}", f"data.root='{tmp_path}'", "data.image_size=8")
        source = instantiate(config["datamodule"]["source"], "data")(split="train")
        assert source.images([0]).shape == (1, 3, 8, 8)
        assert source.captions(0) == (
            ["a photo of a red things"] if name == "imagefolder" else source.captions(0)
        )
        assert type(source).__name__.lower() == name


def test_clip_and_tokenizer_choices(tmp_path):
    logs = tmp_path / "logs"
    for name in files_of("tokenizer"):
        config = configure("clip", logs, f"tokenizer={name}")
        tokenizer = instantiate(config["tokenizer"], "tokenizer")
        tokenizer = tokenizer(["a red circle"]) if config["tokenizer"].get("_partial_") else tokenizer
        assert tokenizer(["a red circle"]).shape == (1, tokenizer.context_length)
    run = untrained("clip", logs)
    config = configure("prior", logs)
    assert Path(config["clip"]["path"]) == run.path
    assert set(files_of("clip")) == {
        "run",
        "open_clip",
    }  # the second needs a download: tests/data/test_open_clip.py


@pytest.mark.parametrize(
    ("words", "metric", "direction"),
    [
        (["model=clip"], "test/image_to_text_r1", "maximize"),
        (["model=clip_paper"], "test/image_to_text_r1", "maximize"),
        (["model=clip", "search.metric=test/loss", "search.direction=minimize"], "test/loss", "minimize"),
        (["model=prior"], "test/loss", "minimize"),
    ],
)
def test_a_search_goes_by_what_is_best_in_a_stage(words, metric, direction):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        search = compose("train", ["hparams_search=optuna", *words])["search"]
    assert (search["metric"], search["direction"]) == (metric, direction)
