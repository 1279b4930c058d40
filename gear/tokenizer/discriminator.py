"""PatchGAN discriminator: decides for each patch of an image whether it is real.

It gives the adversarial term of Eq. 2, and its architecture is that of pix2pix.
"""

from torch import nn

from gear.tokenizer.autoencoder import group_norm


class Discriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, H', W'), one per overlapping patch; larger is more real.

    The network halves the resolution `layers` times and then applies two 4x4 convolutions. With
    `norm` "group" the logits of an image do not depend on the other images of its batch, so that
    accumulated or distributed batches give the gradients of the full batch. The public network has
    "batch".
    """

    def __init__(self, channels=64, layers=3, norm="group"):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        normalise = NORMS[norm]
        blocks = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                normalise(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, images):
        return self.layers(images)


NORMS = {"group": group_norm, "batch": nn.BatchNorm2d}
