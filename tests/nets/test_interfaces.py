"""Our networks have what stages ask for, and one that lacks something is told what."""

from typing import Any

import pytest
import torch
from tiny import NETS, configure
from torch import nn

from dalle.errors import UserError
from dalle.nets import interfaces
from dalle.nets.interfaces import CLIPNet, DecoderNet, TransformerNet, check_interface
from dalle.training.checks import check_config


class Documented(nn.Module):
    """The documented `forward` alone."""

    def forward(
        self, x, t, *, image_embed, text_embed, text_hidden, text_mask, keep_image=None, keep_text=None
    ):
        return x


class Fits(Documented):
    image_size, channels, embed_dim = 16, 3, 8


@pytest.mark.parametrize("model", NETS)
def test_our_networks_conform(tmp_path, model):
    """The rehearsal builds each stage, and each stage holds its network against its Protocol."""
    check_config(configure(model, tmp_path))


def test_what_is_missing_is_named():
    with pytest.raises(
        UserError, match=r"^model\.net: Documented lacks image_size, channels, embed_dim; dalle\.nets"
    ):
        check_interface(Documented(), DecoderNet)
    assert isinstance(check_interface(Fits(), DecoderNet), DecoderNet)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda x, t, *, image_embed, text_embed: x, r"lacks forward\(text_hidden=\), forward\(text_mask=\)"),
        (lambda x, **cond: x, r"forward\(x, t, .*too many positional"),
        (lambda x, t, y, **cond: x, r"missing a required argument: 'y'"),
    ],
)
def test_arguments_of_forward(forward, said):
    net: Any = Fits()
    net.forward = forward
    with pytest.raises(UserError, match=said) as error:
        check_interface(net, DecoderNet)
    assert "\n" not in str(error.value)


def test_any_keywords_will_do():
    net: Any = Fits()
    net.forward = lambda x, t, **cond: x
    check_interface(net, DecoderNet)


def test_an_own_network_is_refused_before_any_training(tmp_path):
    config = configure("decoder", tmp_path)
    config["model"]["net"] = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}
    with pytest.raises(UserError, match=r"model\.net: Linear lacks image_size, channels, embed_dim, forward"):
        check_config(config)
    config = configure("dalle", tmp_path)
    config["model"]["net"] = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}
    with pytest.raises(UserError, match="Linear lacks text_vocab"):
        check_config(config)


def test_protocols_are_written_down():
    for name, found in vars(interfaces).items():
        if getattr(found, "_is_protocol", False) and name != "Protocol":
            assert found.__doc__
            assert "forward" in vars(found) or name in ("Called", "ImageTokenizerNet"), name
    assert "logit_scale" in interfaces._members(CLIPNet)
    assert "step" in interfaces._members(TransformerNet)


def test_muon_says_where_it_finds_no_matrix(tmp_path):
    from functools import partial

    from dalle.optim.factory import OptimizerFactory
    from dalle.optim.muon import Muon

    factory = OptimizerFactory(partial(Muon, muon_lr=0.02), lr=1e-3)
    with pytest.raises(UserError, match=r"optimizer=muon finds no matrix in Linear.*give optimizer=adamw"):
        factory.check(nn.Linear(2, 2))
    factory.check(nn.Sequential(nn.Linear(2, 2)))
    OptimizerFactory(torch.optim.AdamW, lr=1e-3).check(nn.Linear(2, 2))
