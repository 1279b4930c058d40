"""Public vision transformers: how each is built, fed and read, where its weights are and how other
files call them.
"""

import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from gear.config import UserError
from gear.teachers.weights import FILE

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
INSTALL = "pip install timm transformers"


@dataclass(frozen=True)
class ViT:
    """One public network. `{side}` in a text is the side of its input in pixels."""

    library: str  # "timm" or "transformers"
    model: str  # its name there
    repo: str  # on huggingface.co, or the address of a folder elsewhere
    megabytes: int  # of the file there
    source: str  # project and licence
    dim: int
    norm: tuple  # (mean, standard deviation) of pixels in [0, 1]
    file: str = FILE  # in there
    patch: int = 16  # pixels of its own input
    steps: tuple = (
        "normalise",
    )  # what is done to pixels in [0, 1], in order; without "resize" it sees the image as it is
    takes: str = "takes images as they are, in patches of 16 px"  # the same for a reader
    sides: tuple = ()  # the inputs it exists for; empty: any
    last_norm: bool = True  # whether the last layer is read after the network's norm
    spatial: bool = False  # whether features are normalised over the image
    options: tuple = ()  # (name, value) for the library
    image_branch: bool = False  # whether it is V-JEPA 2.1, which the library lacks
    # (pattern, replacement) from a file's names to the library's, in order; None leaves a tensor
    # out
    names: tuple = ()


HEADS = (r"(head|fc_norm|attn_pool)\.", None)
DINOV2 = dict(
    library="timm",
    source="facebookresearch/dinov2, Apache-2.0",
    norm=IMAGENET,
    patch=14,
    steps=("normalise", "resize"),
    takes="resizes images to 14 px a token",
    options=(("dynamic_img_size", True),),
    names=((r"mask_token$", None), HEADS),
)
DINOV3_NAMES = (  # also of facebookresearch/dinov3's own file
    (r".*(mask_token|bias_mask|periods)$", None), (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"^storage_tokens$", "reg_token"), HEADS,
)  # fmt: skip
SIGLIP_NAMES = (  # also of google's own file, for transformers
    (r"(text_model\.|logit_|vision_model\.head\.)", None),
    (r"^vision_model\.", ""),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
    HEADS,
)
VJEPA21_NAMES = (  # of facebookresearch/vjepa2's file, whose videos and inner norms are left out
    (r"^backbone\.", ""),
    (r"(patch_embed\.|video_mod_embed$|norms_block\.[0-2]\.)", None),
    (r"^patch_embed_img\.", "embeddings.patch_embeddings."),
    (r"^img_mod_embed$", "embeddings.modality"),
    (r"^blocks\.", "layer."),
    (r"\.attn\.", ".attention."),
    (r"^norms_block\.3\.", "layernorm."),
)
VITS = {
    "dinov2-b": ViT(
        model="vit_base_patch14_dinov2",
        repo="timm/vit_base_patch14_dinov2.lvd142m",
        megabytes=346,
        dim=768,
        **DINOV2,
    ),
    "dinov2-l": ViT(
        model="vit_large_patch14_dinov2",
        repo="timm/vit_large_patch14_dinov2.lvd142m",
        megabytes=1217,
        dim=1024,
        **DINOV2,
    ),
    "dinov3-b": ViT(
        library="timm",
        model="vit_base_patch16_dinov3_qkvb",
        repo="timm/vit_base_patch16_dinov3_qkvb.lvd1689m",
        megabytes=343,
        source="facebookresearch/dinov3, DINOv3 License",
        dim=768,
        norm=IMAGENET,
        names=DINOV3_NAMES,
    ),
    "siglip2-b": ViT(  # its GELU is the one by tanh; timm's default is the other
        library="timm",
        model="vit_base_patch16_siglip_{side}",
        repo="timm/vit_base_patch16_siglip_{side}.v2_webli",
        megabytes=372,
        source="google/siglip2-base-patch16-{side}, Apache-2.0",
        dim=768,
        norm=HALF,
        sides=(256, 384, 512),
        takes="takes images of 256, 384 or 512 px as they are, in patches of 16 px",
        spatial=True,
        options=(("global_pool", ""), ("act_layer", "gelu_tanh")),
        names=SIGLIP_NAMES,
    ),
    "vjepa2-l": ViT(
        library="transformers",
        model="VJEPA2Model",
        repo="facebook/vjepa2-vitl-fpc64-256",
        megabytes=1304,
        source="facebookresearch/vjepa2, MIT",
        dim=1024,
        norm=IMAGENET,
        spatial=True,
        names=((r"predictor\.", None), (r"^encoder\.", "")),
    ),
    "vjepa2.1-b": ViT(  # of 384 px, but its positions are of any grid
        library="transformers",
        model="VJEPA2Model",
        repo="https://dl.fbaipublicfiles.com/vjepa2",
        file="vjepa2_1_vitb_dist_vitG_384.pt",
        megabytes=1664,  # with the encoder before averaging, the predictor and the optimizer
        source="facebookresearch/vjepa2, MIT",
        dim=768,
        norm=IMAGENET,
        spatial=True,
        options=(
            ("hidden_size", 768),
            ("num_attention_heads", 12),
            ("num_hidden_layers", 12),
            ("tubelet_size", 1),
        ),
        image_branch=True,
        names=VJEPA21_NAMES,
    ),
    "clip-l": ViT(
        library="timm",
        model="vit_large_patch14_clip_quickgelu_224",
        repo="timm/vit_large_patch14_clip_224.openai",
        megabytes=1216,
        source="openai/CLIP, MIT",
        dim=1024,
        norm=CLIP,
        patch=14,
        steps=("resize", "normalise"),
        takes="resizes every image to 224 px, 16 x 16 patches",
        sides=(224,),
        last_norm=False,
        spatial=True,
        names=(HEADS,),
    ),
}


def input_side(name, image_size, stride):
    """Return the side in pixels of the input that gives a patch per `stride` pixels; raises
    UserError where none does.
    """
    vit = VITS[name]
    side = image_size // stride * vit.patch
    if (
        image_size % stride
        or (vit.sides and side not in vit.sides)
        or ("resize" not in vit.steps and side != image_size)
    ):
        tokens = f"{image_size / stride:g} x {image_size / stride:g} tokens"
        raise UserError(
            f"the teacher {name} cannot match the grid of {image_size} px images at stride "
            f"{stride}, {tokens}: it {vit.takes}. "
            "Choose a teacher or a tokenizer whose grid is the other's; dinov2-b and dinov2-l "
            "resize to any."
        )
    return side


def build(name, side):
    """Build a teacher's network with random weights; raises UserError where its library is missing
    or too old.
    """
    vit = VITS[name]
    try:
        if vit.library == "timm":
            import timm

            return timm.create_model(
                vit.model.format(side=side), pretrained=False, num_classes=0, **dict(vit.options)
            )
        import transformers

        config = transformers.VJEPA2Config(crop_size=side, **dict(vit.options))
        encoder = transformers.VJEPA2Model(config).encoder
        return for_images(encoder) if vit.image_branch else encoder
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the teacher {name} needs {vit.library} with {vit.model} ({error}): {INSTALL}"
        ) from None


def renamed(tensors, names):
    """Rename {name: tensor} by `names`; timm's q, k, v become one tensor, V-JEPA 2.1's one becomes
    three, DINOv3's one bias two.
    """
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            if replacement is not None:
                name = re.sub(pattern, replacement, name)
            elif re.match(pattern, name):
                break
        else:
            found[name] = tensor[None] if name == "pos_embed" and tensor.dim() == 2 else tensor
    for name in [n for n in found if ".attn.q_proj." in n]:
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in found for part in parts):
            found[name.replace("q_proj", "qkv")] = torch.cat([found.pop(part) for part in parts])
    for name in [n for n in found if ".attention.qkv." in n]:
        parts = zip(("query", "key", "value"), found.pop(name).chunk(3))
        found |= {name.replace("qkv", part): tensor for part, tensor in parts}
    if "reg_token" in found:  # DINOv3: the key's bias is held at zero
        for name in [n for n in found if n.endswith(".attn.qkv.bias")]:
            query, _, value = found.pop(name).chunk(3)
            found |= {
                name.replace("qkv.bias", "q_bias"): query,
                name.replace("qkv.bias", "v_bias"): value,
            }
    return found


def blocks(network):
    """Return a network's list of blocks, whichever library it is of."""
    return network.layer if hasattr(network, "layer") else network.blocks


# -- V-JEPA 2.1 where it is not V-JEPA 2, after app/vjepa_2_1 of facebookresearch/vjepa2 ----------

TRAINED_GRID = 16  # patches on a side; the positions of every other grid are stretched to its span
ROTARY_BASE = 10000


def for_images(encoder):
    """Turn an encoder of V-JEPA 2, whose tubelets are of one frame, into that of V-JEPA 2.1 for
    images; returns it.
    """
    encoder.embeddings = ImageEmbeddings(encoder.embeddings)
    for block in encoder.layer:
        step = (TRAINED_GRID - 1) / max(block.attention.grid_size - 1, 1)
        block.attention.apply_rotary_embeddings = partial(rotated, step=step)
    return encoder


class ImageEmbeddings(nn.Module):
    """Images (B, 1, 3, H, W) -> patches (B, L, dim), to all of which one learned vector is added:
    what tells images from videos.
    """

    def __init__(self, embeddings):
        super().__init__()
        self.patch_embeddings = embeddings.patch_embeddings
        self.modality = nn.Parameter(torch.zeros(1, 1, embeddings.hidden_size))

    def forward(self, frames):
        return self.patch_embeddings(frames.transpose(1, 2)) + self.modality


def rotated(qk, positions, step):
    """Rotate queries or keys (B, heads, L, D), two neighbouring channels by one angle; V-JEPA 2
    gives each channel its own.

    `positions` are (frame, row, column) of each token, (L,) each, `step` apart; each turns a third
    of the channels, and what three equal even parts leave over stays.
    """
    pairs = qk.shape[-1] // 3 // 2
    frequencies = step * ROTARY_BASE ** -(torch.arange(pairs, device=qk.device) / pairs)
    angles = torch.cat([at[:, None] * frequencies for at in positions], -1)
    angles = F.pad(angles, (0, qk.shape[-1] // 2 - angles.shape[-1]))
    cos, sin = angles.cos(), angles.sin()
    first, second = qk.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.flatten(-2).to(qk.dtype)
