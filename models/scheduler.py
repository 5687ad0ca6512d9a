"""Our way from noise to data as a scheduler of diffusers, so that another can take its place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from skiparse.models import flow

FOR_OTHERS = ("num_train_timesteps", "flow_shift", "use_flow_sigmas", "prediction_type")


class FlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' are untyped
    """Euler steps through the noise levels of :func:`~skiparse.models.flow.inference_sigmas`.

    Its config has what other flow-matching schedulers of diffusers ask for, so that
    ``UniPCMultistepScheduler.from_config(pipe.scheduler.config)`` samples the same model.

    Args:
        shift, schedule: of ``inference_sigmas``.

    Attributes:
        sigmas: fp32 ``[steps + 1]`` on the CPU, from 1 to 0.
        timesteps: fp32 ``[steps]``, what the model is told: ``1000 * sigmas``.

    Raises:
        ValueError: for a shift or a schedule that is none.
    """

    order = 1
    _compatibles: ClassVar[list[str]] = [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
    ]

    @register_to_config
    def __init__(self, *, shift: float = flow.SHIFT, schedule: flow.Schedule = "linear") -> None:
        self.register_to_config(
            num_train_timesteps=1000,
            flow_shift=shift,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            _use_default_values=[],  # a shift that was not asked for is one for others too
        )
        self.set_timesteps(2)

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """As of any scheduler of diffusers; what others ask for follows from the rest."""
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name not in FOR_OTHERS}
        return super().from_config(config, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str = "cpu",
        *,
        shift: float | None = None,
        schedule: flow.Schedule | None = None,
    ) -> None:
        """Begin a way of so many steps.

        Args:
            num_inference_steps: at least 1.
            device: of ``timesteps``.
            shift, schedule: instead of the config's.

        Raises:
            ValueError: as of ``inference_sigmas``.
        """
        schedule = self.config.schedule if schedule is None else schedule
        if shift is None:
            shift = self.config.shift if schedule == self.config.schedule else flow.SHIFT
        self.sigmas = flow.inference_sigmas(num_inference_steps, shift=shift, schedule=schedule)
        self.timesteps = flow.timesteps(self.sigmas[:-1]).to(device)
        self._step = 0

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool = True
    ) -> Any:
        """The latents at the next noise level, in fp32.

        Args:
            model_output: the velocity.
            timestep: which of ``timesteps`` it is for.
            sample: the latents at it.
            return_dict: else a tuple.

        Raises:
            ValueError: if that is not the next one.
        """
        if self._step >= len(self.timesteps) or timestep != self.timesteps[self._step]:
            raise ValueError(
                f"timestep {float(timestep)} is not the next, {self._step + 1} of "
                f"{self.timesteps.tolist()}; begin anew by set_timesteps"
            )
        before, after = self.sigmas[self._step], self.sigmas[self._step + 1]
        self._step += 1
        found = flow.euler_step(sample, model_output, before, after)
        return SchedulerOutput(prev_sample=found) if return_dict else (found,)


def check_scheduler(scheduler: Any) -> None:
    """ValueError unless a scheduler goes along velocities; FlowMatch...'s always do."""
    config, name = scheduler.config, type(scheduler).__name__
    flows = (config.get("use_flow_sigmas"), config.get("prediction_type")) == (
        True,
        "flow_prediction",
    )
    if not flows and not name.startswith("FlowMatch"):
        raise ValueError(
            f"scheduler {name} is not set to flow matching; make it by {name}.from_config("
            f"FlowScheduler().config), or with use_flow_sigmas=True, flow_shift={flow.SHIFT}, "
            'prediction_type="flow_prediction"'
        )
