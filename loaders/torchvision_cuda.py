"""Back end `torchvision_cuda`: `torchvision.io.decode_jpeg` on the device (nvJPEG: the hardware unit where there is one)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from loaders.batched import BatchDecoder
from loaders.decoder import Samples
from loaders.errors import DataError


class TorchvisionCUDADecoder(BatchDecoder):
    """Decodes a stored data set on a CUDA device, a batch in one call; the host's part of the work is in one thread."""

    name = "torchvision_cuda"

    def __init__(self, samples: Samples, device: torch.device) -> None:
        if problem := problem_on(device):
            raise DataError(f"The loader torchvision_cuda cannot be used here: {problem}. Take --efficiency.loader auto.")
        super().__init__(samples, 1, device)

    def _decode(self, ids: np.ndarray) -> list[Tensor]:
        # torch wants writable memory, and the files are mapped read-only.
        encoded = [torch.from_numpy(self.samples.sample(i).copy()) for i in ids]
        return [image.permute(1, 2, 0) for image in decode_jpeg(encoded, ImageReadMode.RGB, device=self._device)]


def problem_on(device: torch.device) -> str | None:
    """None, or why torchvision cannot decode on `device`."""
    if device.type != "cuda":
        return f"it decodes on a CUDA device, and this process works on {device}"
    try:
        decode_jpeg(encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8)), ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        return f"this torchvision does not decode JPEGs on {device} ({str(error).splitlines()[0]})"
    return None
