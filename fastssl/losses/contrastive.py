"""The contrastive loss of MoCo v3: positives and negatives are the keys of the same step's global batch; there is no queue.

Chen et al., ICCV 2021, arXiv 2104.02057, algorithm 1; methods/mocov3.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_batch_contrast(q: Tensor, k: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2 T times the mean over rows of -log softmax(q_r . keys / T) at k_r, the row's own key.

    q, k: [B, D], keys: [G, D], which holds the rows of k among them; unit rows -> scalar.  A row's positive logit is q_r . k_r
    wherever k_r lies in `keys`: no labels, and no rank, are needed.  2 T ln G for queries that know nothing.
    """
    with torch.autocast(q.device.type, enabled=False):  # cosines of 8 bits divided by T are too coarse
        logits = q @ keys.T / temperature
    return 2 * temperature * (logits.logsumexp(-1) - (q * k).sum(-1) / temperature).mean()
