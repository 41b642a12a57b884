"""From plain dicts to objects: the grammar, what is trusted, and the messages."""

from functools import partial

import pytest
from torch import nn

from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError
from dalle.instantiate import check, instantiate

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}


def test_an_object_with_its_arguments():
    linear = instantiate({**LINEAR, "bias": False})
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features, linear.bias) == (3, 2, None)


def test_nested_in_dicts_and_lists_and_left_alone_where_plain():
    made = instantiate({"a": [LINEAR, {"b": LINEAR}], "c": 1, "d": None, "e": ["x", True]})
    assert isinstance(made["a"][0], nn.Linear)
    assert isinstance(made["a"][1]["b"], nn.Linear)
    assert (made["c"], made["d"], made["e"]) == (1, None, ["x", True])


def test_partials_wait_for_what_is_missing():
    made = instantiate({"_target_": "torch.nn.Linear", "_partial_": True, "out_features": 2})
    assert isinstance(made, partial)
    assert made(in_features=5).in_features == 5


def test_arguments_may_be_objects():
    schedule = {"_target_": "dalle.diffusion.schedule.Schedule", "name": "cosine"}
    made = instantiate(
        {"_target_": "dalle.diffusion.denoiser.Denoiser", "_partial_": True, "schedule": schedule}
    )
    assert isinstance(made.keywords["schedule"], Schedule)


def test_extra_arguments_replace_those_of_the_config_unbuilt():
    broken = {"_target_": "dalle.nowhere"}
    linear = instantiate({**LINEAR, "in_features": broken}, in_features=7)
    assert linear.in_features == 7


def test_functions_and_class_methods_are_targets():
    hash_of = {"_target_": "dalle.data.frozen.weights_hash", "module": LINEAR}
    assert len(instantiate(hash_of)) == 16
    assert callable(
        instantiate({"_target_": "dalle.data.tokenizers.CaptionTokenizer.train", "_partial_": True})
    )


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.run", "builtins.eval", "torchvision.io.read_file", "dalle"]
)
def test_only_trusted_packages_are_imported(target):
    with pytest.raises(UserError, match="refusing to import it"):
        instantiate({"_target_": target, "command": "true"})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "dalle.nets.unet.Unet"}, "'dalle.nets.unet.Unet' does not exist"),
        ({"_target_": "dalle.nets.nowhere.UNet"}, "does not exist"),
        (
            {**LINEAR, "in_feature": 3},
            r"^net.in_feature is not an option of Linear; it takes in_features, out_feat",
        ),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, "^net needs out_features$"),
        ({**LINEAR, "in_features": "wide"}, "^net.in_features must be a whole number, got 'wide'$"),
        ({**LINEAR, "in_features": 3.5}, "^net.in_features must be a whole number, got 3.5$"),
        ({**LINEAR, "in_features": True}, "^net.in_features must be a whole number, got True$"),
        ({**LINEAR, "bias": 1}, "^net.bias must be true or false, got 1$"),
    ],
)
def test_mistakes_are_named_by_their_place(node, message):
    for attempt in (instantiate, check):
        with pytest.raises(UserError, match=message):
            attempt(node, "net")


def test_a_mistake_deep_inside_is_named_by_its_path():
    with pytest.raises(UserError, match=r"^model\.layers\[1\]\.bias must be true or false"):
        instantiate({"layers": [LINEAR, {**LINEAR, "bias": "no"}]}, "model")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "dalle.data.open_clip", raising=False)
    with pytest.raises(UserError, match=r"open_clip.*pip install"):
        instantiate(
            {"_target_": "dalle.data.open_clip.load_open_clip", "name": "ViT-B-32", "pretrained": "openai"}
        )


def test_an_object_where_a_number_is_wanted():
    with pytest.raises(
        UserError, match=r"^net\[0\].in_features must be a whole number, got an object of Linear$"
    ):
        check([{**LINEAR, "in_features": LINEAR}], "net")


def test_check_makes_nothing_and_lets_auto_pass(monkeypatch):
    made = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda linear: made.append(linear))
    check({**LINEAR, "in_features": "auto"}, "net")
    check([{**LINEAR, "bias": "auto"}], "net")
    assert made == []
    instantiate(LINEAR)
    assert len(made) == 1


def test_open_ended_arguments_reach_their_owner():
    node = {"_target_": "dalle.diffusion.samplers.Sampler", "method": "ddim", "steps": 3}
    assert isinstance(instantiate({**node, "eta": 0.5}), Sampler)
    with pytest.raises(UserError, match="sampler ddim has no option 'churn'"):
        instantiate({**node, "churn": 1.0})
    with pytest.raises(UserError, match="sampler ddim: eta must be a number from 0 to 1, got 'much'"):
        instantiate({**node, "eta": "much"})
