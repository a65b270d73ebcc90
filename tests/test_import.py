"""What importing costs, and what the trusted core may rest on."""

from importlib import import_module

import pytest
from scripts import modules_after

import hf_dpclip


def test_importing_the_package_loads_no_library():
    loaded = modules_after("import hf_dpclip")
    assert "hf_dpclip" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "evaluate",
        "numpy",
        "dp_accounting",
    }


def test_the_trusted_core_rests_on_torch_numpy_and_dp_accounting_only():
    loaded = modules_after("from hf_dpclip.privacy import *")
    assert {"torch", "numpy", "dp_accounting"} <= loaded
    assert not loaded & {"transformers", "accelerate", "datasets", "peft", "evaluate"}


def test_the_plan_and_the_statement_need_no_torch():
    loaded = modules_after("from hf_dpclip import PrivacyPlan, PrivacyStatement")
    assert "dp_accounting" in loaded
    assert not loaded & {"torch", "transformers"}


@pytest.mark.parametrize("name", hf_dpclip.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hf_dpclip, name).__name__ == name
    assert name in dir(hf_dpclip)


@pytest.mark.parametrize("room", ["privacy", "gradients", "metrics", "models"])
def test_every_name_that_a_room_lists_resolves(room):
    module = import_module(f"hf_dpclip.{room}")
    assert module.__all__
    assert all(hasattr(module, name) for name in module.__all__)
    assert {*module.__all__} <= {*dir(module)}


def test_an_unknown_name_of_the_core_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'hf_dpclip.privacy' has no attribute 'Trainer'"):
        _ = hf_dpclip.privacy.Trainer


def test_the_stable_names_are_public():
    assert {"DPCLIPTrainer", "DPTrainingArguments", "PrivacyPlan"} <= set(hf_dpclip.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_dpclip' has no attribute 'Trainer'"):
        _ = hf_dpclip.Trainer
