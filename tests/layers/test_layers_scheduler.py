"""Explicit steps against the schedulers' own, for all of diffusers' schedulers that run here; pipelines; refusals."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import assert_refused
from torch import Tensor

from fxpatch.errors import LayerError
from fxpatch.layers.scheduler import ExplicitStep, explicit_step

# diffusers' schedulers and numpy 2 (they hand tensors to np.array)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
VOCABULARY = 7


def dpm(**config: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **config)


@dataclass(frozen=True)
class Recipe:
    """What a scheduler needs beyond `cls()`, `set_timesteps(steps)` and `step(output, t, sample)`.

    Attributes:
        config, timesteps: arguments of the two calls.
        tokens: it samples tokens; the model has a logit for each.
        steps: how many of the timesteps are steps, if not all.
        output: of the model, from a sample and a time.
        arguments: of one step, by name, from the scheduler, the number of the step, output, t, sample and what the last
            step returned.
    """

    config: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": 6})
    tokens: bool = False
    steps: int | None = None
    output: Callable[[Tensor, Tensor], Tensor] = lambda sample, t: torch.sin(sample * 1.3 + t.float().mean() * 0.01)
    arguments: Callable[..., dict[str, Any]] = lambda scheduler, number, output, t, sample, last: {
        "model_output": output,
        "timestep": t,
        "sample": sample,
    }


def logits(sample: Tensor, t: Tensor) -> Tensor:
    return torch.sin(sample[..., None] * 1.7 + torch.arange(VOCABULARY) + t.float()) * 3


def also(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The usual arguments, and those of `make(scheduler, number, sample, last)`."""

    def arguments(scheduler: Any, number: int, output: Tensor, t: Tensor, sample: Tensor, last: Any) -> dict[str, Any]:
        return {
            "model_output": output,
            "timestep": t,
            "sample": sample,
            **make(scheduler, number, sample, last),
        }

    return arguments


TOKENS = Recipe(tokens=True, output=logits)
TWO_STEPS = Recipe(timesteps={"num_inference_steps": 2}, steps=2)
RECIPES: dict[str, Recipe] = {
    "AmusedScheduler": Recipe(config={"mask_token_id": VOCABULARY - 1}, tokens=True, output=logits),
    "BlockRefinementScheduler": Recipe(
        config={"block_length": 8}, tokens=True, output=logits, arguments=also(lambda *_: {"temperature": 0.5})
    ),
    "CogVideoXDPMScheduler": Recipe(
        arguments=also(
            lambda scheduler, number, sample, last: {
                "old_pred_original_sample": None if last is None else last[1],
                "timestep_back": scheduler.timesteps[number - 1] if number else None,
            }
        )
    ),
    "ConsistencyDecoderScheduler": TWO_STEPS,
    "DDPMWuerstchenScheduler": Recipe(
        steps=6,  # the seventh time is where the last step arrives
        arguments=lambda scheduler, number, output, t, sample, last: {
            "model_output": output,
            "timestep": t.expand(1),
            "sample": sample,
        },
    ),
    "DPMSolverSDEScheduler": Recipe(config={"noise_sampler_seed": 0}),
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "HeliosDMDScheduler": Recipe(
        timesteps={"num_inference_steps": 4, "stage_index": 0},
        arguments=also(
            lambda scheduler, number, sample, last: {
                "cur_sampling_step": number,
                "dmd_noisy_tensor": torch.cos(sample),
                "dmd_sigmas": scheduler.sigmas,
                "dmd_timesteps": scheduler.timesteps,
                "all_timesteps": scheduler.timesteps,
            }
        ),
    ),
    "HeliosScheduler": Recipe(timesteps={"num_inference_steps": 4, "stage_index": 0}),
    "KarrasVeScheduler": Recipe(
        arguments=lambda scheduler, number, output, t, sample, last: {
            "model_output": output,
            "sigma_hat": scheduler.schedule[t],
            "sigma_prev": scheduler.schedule[t - 1] if t > 0 else 0.0,
            "sample_hat": sample,
        }
    ),
    "PiflowScheduler": Recipe(output=lambda sample, t: torch.sin(sample.repeat(1, 1, 1, 10) + torch.arange(80))),
    "RFD4ProteinaScheduler": Recipe(
        config={"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0, "tail_steps": 2},
        arguments=also(lambda scheduler, number, sample, last: {"emit_mask": torch.ones(sample.shape[:-1])}),
    ),
    "RePaintScheduler": Recipe(
        arguments=also(
            lambda scheduler, number, sample, last: {
                "original_image": torch.ones(1, 3, 8, 8),
                "mask": (torch.arange(8) < 4).expand(1, 3, 8, 8).float(),
            }
        )
    ),
    "SCMScheduler": TWO_STEPS,
    "VQDiffusionScheduler": Recipe(
        config={"num_vec_classes": VOCABULARY + 1},
        tokens=True,
        output=lambda sample, t: torch.log_softmax(logits(sample, t), -1).transpose(1, 2),
    ),
}
MISSING = {  # classes that diffusers offers only with a package that is no dependency of ours
    "CosineDPMSolverMultistepScheduler": "torchsde",
    "DPMSolverSDEScheduler": "torchsde",
    "LMSDiscreteScheduler": "scipy",
}
NO_LOOP = {
    "ScoreSdeVeScheduler": "has step_pred and step_correct, no step",
    "ScoreSdeVpScheduler": "has step_pred, no step",
}


def loop(scheduler: Any, recipe: Recipe, seed: int, step: Callable[..., Any] | None = None) -> list[Tensor]:
    """A whole denoising loop; all tensors that its steps return."""
    step = scheduler.step if step is None else step
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)  # for schedulers that draw without a generator
    scheduler.set_timesteps(**recipe.timesteps)
    start = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 3, 8, 8, generator=start) * float(getattr(scheduler, "init_noise_sigma", 1))
    if recipe.tokens:
        sample = torch.full((1, 8), VOCABULARY - 1)
    extra: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:  # as pipelines do
        extra["generator"] = generator
    seen: list[Tensor] = []
    last = None
    for number, t in enumerate(scheduler.timesteps):
        if number == recipe.steps:
            break
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, t)
        last = step(**recipe.arguments(scheduler, number, recipe.output(scaled, t), t, sample, last), **extra)
        seen += [each for each in last if isinstance(each, Tensor)]
        sample = last[0]
    return seen


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def test_all_of_diffusers_schedulers() -> None:
    import diffusers.schedulers

    outcome: dict[str, str] = {}
    random = set()
    for name in dir(diffusers.schedulers):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        try:
            cls = getattr(diffusers.schedulers, name)
            has_step = hasattr(cls, "step")
        except ImportError as error:
            outcome[name] = f"needs {MISSING[name]}" if MISSING[name] in str(error) else str(error)
            continue
        if not has_step:
            outcome[name] = NO_LOOP.get(name, "has no step")
            continue
        recipe = RECIPES.get(name, Recipe())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated classes say so
            plain, other, mine = (cls(**recipe.config) for _ in range(3))
            want = loop(plain, recipe, seed=3)
            if not equal(loop(other, recipe, seed=4), want):
                random.add(name)
            with explicit_step(mine) as step:
                assert mine.step is step
                assert inspect.signature(mine.step) == inspect.signature(plain.step)
                outcome[name] = "equal" if equal(loop(mine, recipe, seed=3), want) else "differs"
            assert "step" not in vars(mine)
    assert {name for name, what in outcome.items() if what == "differs"} == set()
    left = {name: what for name, what in outcome.items() if what != "equal"}
    assert left.items() <= {name: f"needs {package}" for name, package in MISSING.items()}.items() | NO_LOOP.items()
    assert sum(what == "equal" for what in outcome.values()) >= 40, outcome
    print(f"{sum(what == 'equal' for what in outcome.values())} equal, {len(random)} by their generators; {left}")
    assert len(random) >= 15, random  # schedulers whose generator counts: losing it would have been seen


ALGORITHMS = [
    (name, order) for name in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++") for order in (1, 2, 3)
]
ALGORITHMS.remove(("sde-dpmsolver", 3))  # diffusers has none


@pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")  # two of them are deprecated
@pytest.mark.parametrize(("algorithm", "order"), ALGORITHMS)
def test_dpm_solver(algorithm: str, order: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    kwargs: dict[str, Any] = {"algorithm_type": algorithm, "solver_order": order, "final_sigmas_type": "sigma_min"}
    plain, mine = DPMSolverMultistepScheduler(**kwargs), DPMSolverMultistepScheduler(**kwargs)
    explicit_step(mine)
    assert equal(loop(mine, Recipe(), 3), loop(plain, Recipe(), 3))


def one_step(scheduler: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The second of four steps: the first of a solver has no history."""
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2, 2, 2)
    first = scheduler.step(x, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
    out = scheduler.step(torch.sin(first), scheduler.timesteps[1], first, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out.prev_sample


def test_every_argument_arrives() -> None:
    plain, mine = dpm(), dpm()
    explicit_step(mine)
    noise = torch.full((1, 2, 2, 2), 0.25)
    for args, kwargs in (
        ((), {"variance_noise": noise}),
        ((None, noise, False), {}),
        ((), {"return_dict": False, "variance_noise": noise}),
    ):
        assert torch.equal(one_step(mine, *args, **kwargs), one_step(plain, *args, **kwargs))
    with_seed = [one_step(mine, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(with_seed[0], with_seed[1])
    assert not torch.equal(with_seed[0], with_seed[2])


class Loses:
    """An engine's wrapper as it was before SGLang #24798, and worse: it does not pass on what it is given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        return self._inner.step(model_output, timestep, sample, return_dict=kwargs.get("return_dict", True))


class Passes(Loses):
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        return self._inner.step(model_output, timestep, sample, **kwargs)


def test_the_seeds_problem() -> None:
    """A lost generator: no error, and two runs with one seed differ. The sweep above would see it."""

    def run(step: Callable[..., Any], scheduler: Any) -> Tensor:
        torch.seed()
        scheduler.set_timesteps(4)
        x = torch.ones(1, 2, 2, 2)
        out: Tensor = step(x, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(5), return_dict=False)[
            0
        ]
        return out

    losing = [dpm(), dpm()]
    assert not torch.equal(*(run(Loses(each).step, each) for each in losing))
    assert "generator" not in inspect.signature(Loses(losing[0]).step).parameters  # so a pipeline would pass none
    explicit = [dpm(), dpm()]
    assert torch.equal(*(run(explicit_step(Passes(each), like=each), each) for each in explicit))


def test_a_wrapper_with_keywords() -> None:
    inner = dpm()
    wrapper = Passes(inner)
    with pytest.raises(LayerError, match="explicit_step\\(scheduler, like=the scheduler that it wraps\\)") as error:
        explicit_step(wrapper)
    assert "The step of Passes does not say what it takes." in str(error.value)
    step = explicit_step(wrapper, like=inner)
    assert step.accepted == ("model_output", "timestep", "sample", "generator", "variance_noise", "return_dict")
    assert explicit_step(wrapper, like=type(inner)) is step  # a class is as good
    plain = dpm()
    inner.set_timesteps(4)
    plain.set_timesteps(4)
    x, noise = torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5)
    args = (x, inner.timesteps[0], x, None, noise, False)  # positions that the wrapper itself does not have
    assert torch.equal(wrapper.step(*args)[0], plain.step(*args)[0])
    with pytest.raises(LayerError, match="unknown: eta"):
        wrapper.step(x, inner.timesteps[1], x, eta=0.0)


def test_like_by_name_and_with_its_defaults() -> None:
    class Other:
        def step(self, sample: int, timestep: int, generator: str = "mine") -> Any:
            return sample, timestep, generator

    class Like:
        def step(self, timestep: int, sample: int, generator: str = "like's") -> Any: ...

    other = Other()
    explicit_step(other, like=Like)
    assert other.step(1, 2) == (2, 1, "like's")


def test_positional_only_and_keyword_only() -> None:
    class Strict:
        def step(self, output: int, /, t: int, *, eta: float = 0.5) -> Any:
            return output, t, eta

    strict = Strict()
    explicit_step(strict)
    assert strict.step(1, t=2) == (1, 2, 0.5)
    assert strict.step(1, 2, eta=1.0) == (1, 2, 1.0)
    with pytest.raises(LayerError, match="too many positional arguments"):
        strict.step(1, 2, 3)


# ------------------------------------------------------------------------------------------- the object stays itself


def test_config_attributes_and_class_stay(tmp_path: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler, SchedulerMixin

    plain, mine = dpm(solver_order=3), dpm(solver_order=3)
    explicit_step(mine)
    assert isinstance(mine, SchedulerMixin)
    assert type(mine) is DPMSolverMultistepScheduler
    assert mine.config == plain.config
    mine.set_timesteps(5)
    assert mine.timesteps.tolist() == sorted(mine.timesteps.tolist(), reverse=True)
    assert mine.order == plain.order
    mine.save_pretrained(tmp_path)
    again = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.solver_order == 3
    assert "step" not in vars(DPMSolverMultistepScheduler.from_config(mine.config))
    assert mine.step.__doc__ == DPMSolverMultistepScheduler.step.__doc__
    assert repr(mine.step).startswith("explicit step of DPMSolverMultistepScheduler(model_output")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_steps_itself(how: str) -> None:
    original = dpm()
    explicit_step(original)
    original.set_timesteps(4)
    other = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert isinstance(other.step, ExplicitStep)
    assert other.step.scheduler is other
    x = torch.ones(1, 2, 2, 2)
    other.step(x, other.timesteps[0], x)
    assert (other.step_index, original.step_index) == (1, None)
    other.step.undo()
    assert isinstance(original.step, ExplicitStep)


def test_undo() -> None:
    scheduler = dpm()
    own = scheduler.step
    step = explicit_step(scheduler)
    assert explicit_step(scheduler) is step
    step.undo()
    step.undo()
    assert scheduler.step == own
    assert "step" not in vars(scheduler)
    with pytest.raises(ZeroDivisionError), explicit_step(scheduler):
        raise ZeroDivisionError
    assert scheduler.step == own


def test_undo_over_a_step_of_the_object_itself() -> None:
    scheduler = dpm()

    def mine(model_output: Tensor, timestep: Tensor, sample: Tensor) -> str:
        return "mine"

    scheduler.step = mine
    with explicit_step(scheduler):
        assert scheduler.step(None, None, None) == "mine"
        with pytest.raises(LayerError, match="unknown: generator"):
            scheduler.step(None, None, None, generator=None)
    assert scheduler.step is mine


def test_undo_does_not_undo_another() -> None:
    scheduler = dpm()
    step = explicit_step(scheduler)
    later = scheduler.step = lambda *args: None
    with pytest.raises(LayerError, match="undo in the opposite order"):
        step.undo()
    assert scheduler.step is later


def test_in_a_pipeline() -> None:
    """The same image, by the same seed. DDIMPipeline makes a scheduler of its own from the config of the one it is
    given: that one has to be made explicit, and not the one that is passed."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def image(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(generator=generator, eta=0.7, num_inference_steps=3, output_type="np").images

    want = image(7)
    with explicit_step(pipeline.scheduler) as step:
        assert pipeline.scheduler.step is step
        assert (image(7) == want).all()
        assert not (image(8) == want).all()
    assert (image(7) == want).all()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("DDIMScheduler", {"eta", "generator"}),
        ("DPMSolverMultistepScheduler", {"generator"}),
        ("UniPCMultistepScheduler", set()),
    ],
)
def test_what_sanas_pipeline_finds_in_the_signature(name: str, want: set[str]) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)()
    explicit_step(scheduler)
    find = diffusers.SanaPipeline.prepare_extra_step_kwargs
    found = find(SimpleNamespace(scheduler=scheduler), generator=torch.Generator(), eta=0.3)
    assert found.keys() == want


def test_on_the_device(musa: str) -> None:
    """Noise is drawn on the CPU with the CPU's generator, so the device's samples are the CPU's."""
    results = []
    for device in ("cpu", musa):
        scheduler = dpm()
        explicit_step(scheduler)
        scheduler.set_timesteps(4, device=device)
        x = torch.ones(1, 2, 2, 2, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        results.append(x.cpu())
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------------------------------- bad input


def explicit() -> Any:
    scheduler = dpm()
    explicit_step(scheduler)
    scheduler.set_timesteps(2)
    return scheduler


def other_parameters() -> None:
    scheduler = explicit()
    explicit_step(scheduler, like=type("Like", (), {"step": lambda self, model_output, timestep, sample: None}))


X = torch.ones(1, 2, 2, 2)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (
        lambda: explicit().step(X, 1, X, eta=0.0, s_churn=1.0),
        "The step of DPMSolverMultistepScheduler cannot be called like this.\n  seen: unknown: eta, s_churn\n"
        "  expected: model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, generator: ",
    ),
    "missing": (lambda: explicit().step(X, 1), "seen: missing a required argument: 'sample'\n"),
    "twice": (lambda: explicit().step(X, 1, X, sample=X), "seen: multiple values for argument 'sample'\n"),
    "too many": (lambda: explicit().step(X, 1, X, None, None, True, 7), "seen: too many positional arguments\n"),
    "no step": (lambda: explicit_step(X), "A scheduler has a step.\n  seen: tensor("),
    "a class": (lambda: explicit_step(Passes), "seen: the class Passes\n  expected: an object with a method `step`"),
    "like without step": (lambda: explicit_step(Passes(None), like=X), "`like` says which parameters a step has."),
    "like has more": (
        lambda: explicit_step(dpm(), like=type("Like", (), {"step": lambda self, model_output, eta: None})),
        "The step of DPMSolverMultistepScheduler does not take what `like` has.",
    ),
    "like has keywords": (lambda: explicit_step(dpm(), like=Passes(None)), "does not say what it takes."),
    "other parameters": (other_parameters, "is explicit already, with other parameters."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert_refused(*REFUSED[name])


def test_errors_of_the_step_itself_are_its_own() -> None:
    scheduler = dpm()
    explicit_step(scheduler)
    with pytest.raises(ValueError, match="you need to run 'set_timesteps'") as error:
        scheduler.step(X, 1, X)
    assert not isinstance(error.value, LayerError)
