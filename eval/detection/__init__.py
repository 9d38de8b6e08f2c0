"""Object detection and instance segmentation from a pretrained ResNet, as Detectron2 configures it (methods/transfer.md, 1-4)."""
