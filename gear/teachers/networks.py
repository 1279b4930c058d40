"""Public vision transformers: how each is built, which input it takes and which output is read,
where its weights are, and which names they have in other files.
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
    """One public network. `{side}` in a text stands for the side of its input in pixels."""

    library: str  # "timm" or "transformers"
    model: str  # name of the network in the library
    repo: str  # repository on huggingface.co, or the address of a folder elsewhere
    megabytes: int  # size of the weight file
    source: str  # project and licence
    dim: int  # width of the features
    norm: tuple  # (mean, standard deviation) with which pixels in [0, 1] are normalised
    file: str = FILE  # name of the weight file in the repository
    patch: int = 16  # pixels of the network's input per patch, along each side
    # preprocessing of pixels in [0, 1], in order; without "resize" the image keeps its size
    steps: tuple = ("normalise",)
    # the preprocessing in words, for an error message
    takes: str = "takes images as they are, in patches of 16 px"
    sides: tuple = ()  # input sides for which the network exists; empty for any
    last_norm: bool = True  # whether the last layer is read after the network's final norm
    spatial: bool = False  # whether features are normalised over the image, see normalise.py
    options: tuple = ()  # (name, value) pairs for the library
    image_branch: bool = False  # whether it is V-JEPA 2.1, which `for_images` makes of V-JEPA 2
    # (pattern, replacement) pairs, applied in order, from a file's names to the library's; a
    # replacement of None leaves the tensor out
    names: tuple = ()


HEADS = (r"(head|fc_norm|attn_pool)\.", None)
DINOV2 = dict(
    library="timm",
    source="facebookresearch/dinov2, Apache-2.0",
    norm=IMAGENET,
    patch=14,
    steps=("normalise", "resize"),
    takes="resizes images to 14 px per token",
    options=(("dynamic_img_size", True),),
    names=((r"mask_token$", None), HEADS),
)
DINOV3_NAMES = (  # also for the file of facebookresearch/dinov3
    (r".*(mask_token|bias_mask|periods)$", None), (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"^storage_tokens$", "reg_token"), HEADS,
)  # fmt: skip
SIGLIP_NAMES = (  # also for Google's file, which is for transformers
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
# for the file of facebookresearch/vjepa2; what it has for videos, and its inner norms, is left out
VJEPA21_NAMES = (
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
    "siglip2-b": ViT(  # its GELU is the tanh approximation, which is not timm's default
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
    "vjepa2.1-b": ViT(  # trained at 384 px; its rotary positions fit any grid
        library="transformers",
        model="VJEPA2Model",
        repo="https://dl.fbaipublicfiles.com/vjepa2",
        file="vjepa2_1_vitb_dist_vitG_384.pt",
        megabytes=1664,  # the file also has the live encoder, the predictor and the optimizer
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
    """Return the side in pixels of the network's input that gives one patch per `stride` pixels.

    Raises UserError where the network has no such input.
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
            f"{stride}, {tokens}: it {vit.takes}. Choose a teacher and a tokenizer with the same "
            "grid; dinov2-b and dinov2-l resize to any grid."
        )
    return side


def build(name, side):
    """Build a teacher's network with random weights.

    Raises UserError where its library is missing or too old.
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
    """Return {name: tensor} with the names, and the split, of the library's network.

    `names` are (pattern, replacement) pairs as in ViT. Separate q, k and v tensors become one for
    timm, the one of V-JEPA 2.1 becomes three for transformers, and the one bias of DINOv3 becomes
    two.
    """
    renamed_tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names:
            if replacement is not None:
                name = re.sub(pattern, replacement, name)
            elif re.match(pattern, name):
                break
        else:
            is_unbatched = name == "pos_embed" and tensor.dim() == 2
            renamed_tensors[name] = tensor[None] if is_unbatched else tensor
    for name in [n for n in renamed_tensors if ".attn.q_proj." in n]:
        qkv_names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(n in renamed_tensors for n in qkv_names):
            qkv = torch.cat([renamed_tensors.pop(n) for n in qkv_names])
            renamed_tensors[name.replace("q_proj", "qkv")] = qkv
    for name in [n for n in renamed_tensors if ".attention.qkv." in n]:
        parts = zip(("query", "key", "value"), renamed_tensors.pop(name).chunk(3))
        renamed_tensors |= {name.replace("qkv", part): tensor for part, tensor in parts}
    if "reg_token" in renamed_tensors:  # DINOv3, in which the bias of the keys is always zero
        for name in [n for n in renamed_tensors if n.endswith(".attn.qkv.bias")]:
            query, _, value = renamed_tensors.pop(name).chunk(3)
            renamed_tensors[name.replace("qkv.bias", "q_bias")] = query
            renamed_tensors[name.replace("qkv.bias", "v_bias")] = value
    return renamed_tensors


def blocks(network):
    """Return the list of a network's blocks, in timm or in transformers."""
    return network.layer if hasattr(network, "layer") else network.blocks


# -- differences of V-JEPA 2.1 from V-JEPA 2, after app/vjepa_2_1 of facebookresearch/vjepa2 ------

# patches per side in training; positions in any other grid are scaled to the same range
TRAINED_GRID = 16
ROTARY_BASE = 10000


def for_images(encoder):
    """Turn an encoder of V-JEPA 2 with tubelets of one frame into V-JEPA 2.1's for images.

    The encoder is changed in place and returned.
    """
    encoder.embeddings = ImageEmbeddings(encoder.embeddings)
    for block in encoder.layer:
        step = (TRAINED_GRID - 1) / max(block.attention.grid_size - 1, 1)
        block.attention.apply_rotary_embeddings = partial(rotated, step=step)
    return encoder


class ImageEmbeddings(nn.Module):
    """Images (B, 1, 3, H, W) -> embedded patches (B, L, dim).

    One learned vector, which distinguishes images from videos, is added to all patches.
    """

    def __init__(self, embeddings):
        super().__init__()
        self.patch_embeddings = embeddings.patch_embeddings
        self.modality = nn.Parameter(torch.zeros(1, 1, embeddings.hidden_size))

    def forward(self, frames):
        return self.patch_embeddings(frames.transpose(1, 2)) + self.modality


def rotated(qk, positions, step):
    """Rotate queries or keys (B, heads, L, D): each pair of neighbouring channels by one angle.

    V-JEPA 2 has one angle per channel instead. `positions` are the frames, rows and columns of the
    tokens, (L,) each, and `step` is the distance between neighbouring positions. Each of the three
    rotates one third of the channels, rounded down to pairs; the remaining channels are unchanged.
    """
    num_pairs = qk.shape[-1] // 3 // 2
    frequencies = step * ROTARY_BASE ** -(torch.arange(num_pairs, device=qk.device) / num_pairs)
    angles = torch.cat([position[:, None] * frequencies for position in positions], -1)
    angles = F.pad(angles, (0, qk.shape[-1] // 2 - angles.shape[-1]))
    cos, sin = angles.cos(), angles.sin()
    first, second = qk.unflatten(-1, (-1, 2)).unbind(-1)
    rotated_pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated_pairs.flatten(-2).to(qk.dtype)
