"""All kinds of golden file: KINDS[kind](arrays) raises AssertionError where the project does not reproduce an output."""

from __future__ import annotations

from tests.golden import augmentation, byol_family, data_rules, dino_family, dino_optim, distillation_family, evaluation, vit_family

KINDS = {
    **augmentation.KINDS,
    **byol_family.KINDS,
    **data_rules.KINDS,
    **dino_family.KINDS,
    **dino_optim.KINDS,
    **distillation_family.KINDS,
    **evaluation.KINDS,
    **vit_family.KINDS,
}

# Kinds whose issues are not built yet.
PENDING = frozenset(
    """
    auh/dist auh/loss auh/projector
    dino/knn dino/linear
    ibot/head ibot/knn ibot/lars ibot/layerdecay ibot/loss ibot/mask_block ibot/mask_stats ibot/posembed ibot/schedules ibot/step
    ibot/vit
    lewel_m/loss lewel_m/step
    mocov2/ddp mocov2/eman_step mocov2/loss mocov2/schedules mocov2/step
    mocov3/loss mocov3/posembed mocov3/sched mocov3/step mocov3/vit_forward mocov3/vit_init
    sere/grid sere/heads sere/loss sere/step
    sfrik/dist sfrik/headsched sfrik/kernel sfrik/knn sfrik/lars sfrik/logreg sfrik/lr sfrik/obow
    sfrik/projector sfrik/resnet sfrik/swav sfrik/train sfrik/twoview
    simclr/dist simclr/loss simclr/projector
    transfer/anchors transfer/boxcoder transfer/d2model_c4_mask transfer/d2model_fpn_mask transfer/d2params transfer/keymap
    transfer/mask transfer/matcher transfer/miou transfer/photo transfer/pooler transfer/precisebn transfer/resize transfer/roi
    transfer/rpn transfer/sched transfer/seghead transfer/slide transfer/vocap
    vicreg/dist vicreg/loss vicreg/projector
    w2ssl/branches w2ssl/d2keys w2ssl/decouple w2ssl/dist w2ssl/lars w2ssl/montage w2ssl/reference_curves
    w2ssl/resnet50 w2ssl/sched w2ssl/step w2ssl/supclu
    """.split()
)
