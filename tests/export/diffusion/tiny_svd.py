"""Stable Video Diffusion with random weights and real shapes, and the scheduler AnimateLCM-SVD is published with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.export.diffusion.tiny_pipelines import fill_zeros, shake

FRAMES = 5
EULER = {  # as SVD's folder has it
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
CONSISTENCY = {"num_train_timesteps": 40, "sigma_max": 700.0, "sigma_data": 1.0, "clip_denoised": False}


class AnimateLCMSVDStochasticIterativeScheduler(diffusers.CMStochasticIterativeScheduler):  # type: ignore[misc]
    """What the authors' scheduler computes, as differences from diffusers' class."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
    ) -> None:
        super().__init__(num_train_timesteps, sigma_min, sigma_max, sigma_data, s_noise, rho, clip_denoised)
        self.init_noise_sigma = (sigma_max**2 + 1) ** 0.5

    def sigma_to_t(self, sigmas: Any) -> Any:
        """ln(sigma) / 4, as SVD was trained."""
        return super().sigma_to_t(sigmas) / 1000

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """The denoiser of EDM on v, then the whole of the next sigma in noise."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, data = self.sigmas[self.step_index], self.config.sigma_data
        last = self.step_index + 1 == len(self.timesteps)
        after = 0.0 if last else self.sigmas[self.step_index + 1]
        scale = (sigma**2 + data**2) ** 0.5
        denoised = data**2 / scale**2 * sample - sigma * data / scale * model_output
        noise = randn_tensor(sample.shape, generator=generator) if len(self.timesteps) > 1 else 0.0
        self._step_index += 1
        moved = denoised + after * noise
        out = diffusers.schedulers.scheduling_consistency_models.CMStochasticIterativeSchedulerOutput(moved)
        return out if return_dict else (moved,)


def image_encoder() -> CLIPVisionModelWithProjection:
    """CLIP's picture tower of two layers on 16 patches of 224 pixels."""
    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        intermediate_size=37,
        patch_size=56,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    shake(model)
    return model


def frames_unet() -> diffusers.UNetSpatioTemporalConditionModel:
    """Two levels, the upper with cross-attention; every level looks along time."""
    torch.manual_seed(0)
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=32,
        num_attention_heads=2,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=FRAMES,
    ).eval()
    fill_zeros(model)
    return model


def frames_autoencoder() -> diffusers.AutoencoderKLTemporalDecoder:
    """Two levels: pictures are twice the latent's size."""
    torch.manual_seed(2)
    model = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    ).eval()
    fill_zeros(model)
    return model


def svd(scheduler: Any = None) -> diffusers.StableVideoDiffusionPipeline:
    """The pipeline, with SVD's own scheduler unless given another."""
    return diffusers.StableVideoDiffusionPipeline(
        vae=frames_autoencoder(),
        image_encoder=image_encoder(),
        unet=frames_unet(),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**EULER),
        feature_extractor=CLIPImageProcessor(do_resize=False, do_center_crop=False),
    )
