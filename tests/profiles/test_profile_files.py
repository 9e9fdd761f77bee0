"""The profiles that ship: each loads, is what it says in torch's own terms, and leaves its numbers consistent."""

from __future__ import annotations

import tomllib
from dataclasses import FrozenInstanceError, asdict
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import compile_configs
from compile_configs import DeviceProfile, ProfileError, builtin_names, builtin_profiles, load_profile, parse_profile
from compile_configs.profile import Setting

HERE = Path(compile_configs.__file__).parent
EVERY = [*builtin_names(), "example"]


@pytest.fixture(params=EVERY)
def profile(request: pytest.FixtureRequest) -> DeviceProfile:
    return load_profile(request.param)


def test_the_names_are_frozen() -> None:
    assert compile_configs.__all__ == [
        "DeviceProfile",
        "Matched",
        "ProfileError",
        "Rejected",
        "builtin_names",
        "builtin_profiles",
        "load_profile",
        "match",
        "parse_profile",
    ]
    assert builtin_names() == ("cpu", "cuda", "musa", "npu", "xpu")


def test_all_of_them_are_keyed_by_their_device() -> None:
    assert {name: profile.device for name, profile in builtin_profiles().items()} == {n: n for n in builtin_names()}


def test_every_toml_file_is_a_profile_that_is_named_like_its_device() -> None:
    assert {file.stem for file in HERE.glob("*.toml")} == set(EVERY)
    assert {load_profile(file).device for file in HERE.glob("*.toml")} == set(EVERY)


def test_a_name_and_a_path_give_the_same(profile: DeviceProfile) -> None:
    file = HERE / f"{profile.device}.toml"
    assert load_profile(file) == load_profile(str(file)) == profile
    assert (profile.origin, load_profile(file).origin) == (f"compile_configs/{profile.device}.toml", str(file))


def test_it_survives_a_round_trip(profile: DeviceProfile) -> None:
    mapping = asdict(profile)
    assert mapping.pop("origin") == profile.origin
    assert parse_profile(mapping) == profile
    assert parse_profile(tomllib.loads((HERE / f"{profile.device}.toml").read_text())) == profile


def test_it_is_a_value(profile: DeviceProfile) -> None:
    assert len({profile, load_profile(profile.device)}) == 1
    with pytest.raises(FrozenInstanceError):
        profile.device = "other"  # type: ignore[misc]


@pytest.mark.parametrize("table", ["dynamo", "inductor"])
def test_its_settings_are_settings_of_torch_with_the_type_of_the_default(profile: DeviceProfile, table: str) -> None:
    module = pytest.importorskip(f"torch._{table}.config")
    for setting in getattr(profile, table):
        default = attrgetter(setting.name)(module)
        assert type(setting.value) is type(default), setting.name


def test_its_tags_are_tags_of_torch(profile: DeviceProfile) -> None:
    assert set(profile.capture.split_tags) <= set(torch.Tag.__members__)
    assert profile.capture.split_tags[0] == "cudagraph_unsafe"


def test_its_collectives_are_operators_of_torch(profile: DeviceProfile) -> None:
    torch_s_own = [name for name in profile.splitting_operators if name.startswith("_c10d_functional::")]
    assert all(hasattr(torch.ops._c10d_functional, name.partition("::")[2]) for name in torch_s_own)
    assert bool(torch_s_own) == (profile.device == "musa")


def test_its_sizes_stay_under_its_budget_for_a_deep_model(profile: DeviceProfile) -> None:
    assert profile.capture.sizes[0] >= 2, "Dynamo makes a graph of its own for 1"
    if profile.device == "npu":  # one group of ranks: 40 streams for itself, and two more for each graph
        assert len(profile.capture.sizes) * (48 + 1) * (1 + 2) <= profile.capture.budget - 40
    elif profile.device == "musa":
        assert len(profile.capture.sizes) * (80 + 1) <= profile.capture.budget


def test_what_matters_most_about_each_device() -> None:
    of = builtin_profiles()
    assert {name: p.compiler for name, p in of.items()} == {
        "cpu": "inductor",
        "cuda": "inductor",
        "musa": "aot_eager",
        "npu": "aot_eager",
        "xpu": "inductor",
    }
    assert {name: p.capture.budget for name, p in of.items()} == {
        "cpu": None,
        "cuda": None,
        "musa": 1900,
        "npu": 1800,
        "xpu": None,
    }
    assert {name: p.capture.classes for name, p in of.items()} == {
        "cpu": (),
        "cuda": ("torch.cuda.CUDAGraph",),
        "musa": ("torch.musa.MUSAGraph",),
        "npu": ("torch.accelerator.Graph", "torch.npu.NPUGraph"),
        "xpu": ("torch.accelerator.Graph", "torch.xpu.XPUGraph"),
    }
    assert {name: p.packages for name, p in of.items() if p.packages} == {
        "musa": ("torch_musa", "torchada"),
        "npu": ("torch_npu",),
    }
    assert {(n, s.name, s.value) for n, p in of.items() for s in p.dynamo + p.inductor} == {
        ("musa", "compile_threads", 1)
    }


def test_an_operator_in_two_lists_is_named_once() -> None:
    twice = [{"operators": ["a::b", "a::c"], "source": "x"}, {"operators": ["a::c", "a::d"], "source": "y"}]
    changed = parse_profile({**asdict_without_origin("cpu"), "split": twice})
    assert changed.splitting_operators == ("a::b", "a::c", "a::d")


def test_example_is_not_the_name_of_a_device_and_is_not_listed() -> None:
    with pytest.raises(RuntimeError, match="Expected one of"):
        torch.device(load_profile("example").device)
    assert "example" not in builtin_names()


def test_example_shows_every_key_there_is() -> None:
    example = load_profile("example")
    for table in [
        example,
        example.capture,
        *example.split,
        *example.dynamo,
        *example.inductor,
        *example.wrong_fakes,
        *example.limits,
    ]:
        for name, value in asdict(table).items():
            assert value or isinstance(value, bool), f"example.toml leaves out {name}"


def test_a_table_built_by_hand_is_checked_as_well() -> None:
    with pytest.raises(ProfileError, match=r"^compile profile Setting: 'value' has a wrong type\n"):
        Setting("compile_threads", [1], "why", "where")  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match=r"^compile profile mine: 'min_torch' is too old\n"):
        DeviceProfile("x", "X", "x", "2.4", "eager", load_profile("cpu").capture, origin="mine")


def test_importing_it_and_loading_a_profile_takes_the_standard_library_only(fresh) -> None:
    found = fresh(
        """
        import sys
        sys.path.insert(0, "..")
        import compile_configs
        compile_configs.load_profile("musa")
        names = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - {"compile_configs"}
        print(sorted(names & {"torch", "fxpatch", "fake_kernels", "wrapt", "rich", "packaging"}))
        """
    )
    assert found == "[]\n"


def asdict_without_origin(name: str) -> dict[str, object]:
    mapping = asdict(load_profile(name))
    del mapping["origin"]
    return mapping
