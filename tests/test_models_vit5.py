"""The ViT-5 block and its switches: one block for both uses, positions that mean what they say, the named variants."""

import inspect

import pytest
import torch
from test_models_transformer import batch, make
from torch._subclasses.fake_tensor import FakeTensorMode

from vit5gen.models import VARIANTS, SiTTransformer2DModel, ViT5, ViT5Block, layers
from vit5gen.models.layers import LayerNorm, RMSNorm
from vit5gen.models.positions import Segment, resample_positions, rope_table, rotate, sincos_table
from vit5gen.models.vit5 import ViT5Backbone

# The seven components of the article, each taken out.
REMOVALS = {
    "LayerScale": {"layer_scale": "none"},
    "RMSNorm": {"norm": "layer"},
    "GELU": {"activation": "swiglu"},
    "APE": {"absolute_position": "none"},
    "RoPE": {"rope": False},
    "high-frequency register RoPE": {"register_theta": 10000.0},
    "register RoPE": {"register_rope": False},
    "registers": {"num_registers": 0},
    "QK-norm": {"qk_norm": False},
    "bias-free qkv": {"qkv_bias": True},
}
OTHERS = {
    "gamma alone": {"layer_scale": "gamma_only", "gamma_init": 1},
    "fixed APE": {"absolute_position": "sincos_fixed"},
    "affine norms": {"affine_norms": True},
    "nine registers": {"num_registers": 9, "rope_theta": 100.0, "weight_init": "trunc_normal"},
}
CPU = torch.device("cpu")


def test_classifier_and_generator_share_one_block_class():
    classifier = ViT5(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    blocks = [*classifier.blocks, *make("vit5").backbone.blocks]
    assert {type(block) for block in blocks} == {ViT5Block}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_modulation_equals_the_classifiers_use_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    block = ViT5Block(32, 2, 4.0, modulated=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.5, 0.3, generator=generator)
        block.modulation.weight.zero_()
        block.modulation.bias.copy_(torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(32))
    plain = ViT5Block(32, 2, 4.0)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("modulation")})
    x, c = (torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((11, 32), (32,)))
    rope = rope_table((Segment((1, 1)), Segment((3, 2), 10000.0), Segment((2, 2), 100.0)), 16, CPU)
    block, plain = block.to(dtype), plain.to(dtype)
    assert torch.equal(block(x, c, rope), plain(x, None, rope))


@pytest.mark.parametrize("switches", [*VARIANTS.values(), *REMOVALS.values(), *OTHERS.values()], ids=str)
def test_every_parameter_gets_a_gradient(switches):
    model = make("vit5", backbone_kwargs=switches)
    model(*batch()).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_weights_start_as_the_classifiers_on_demand():
    classifier = ViT5(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=40)
    backbone = make("vit5", activate=False, backbone_kwargs={"weight_init": "trunc_normal"}).backbone
    for model, skipped in ((classifier, "patch_embed"), (backbone, "pos_embed")):
        for name, p in model.named_parameters():
            if name.endswith("bias") and skipped not in name:
                assert not p.any(), name
            elif p.ndim > 1 and skipped not in name:
                assert p.std().item() == pytest.approx(0.0 if "modulation" in name else 0.02, rel=0.5), name


def test_every_parameter_of_sit_gets_a_gradient():
    model = make("sit")
    model(*batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in (*REMOVALS, *OTHERS) if name != "fixed APE"])
def test_every_switch_changes_the_function(name):
    """A switch that is accepted but not read would give the very same output."""
    plain, changed = make("vit5"), make("vit5", backbone_kwargs=(REMOVALS | OTHERS)[name])
    shared = {k: v for k, v in plain.state_dict().items() if k in changed.state_dict()}
    own = changed.state_dict()
    changed.load_state_dict(own | {k: v for k, v in shared.items() if v.shape == own[k].shape})
    assert not torch.allclose(plain(*batch()), changed(*batch()), rtol=1e-4)


def count(**switches):
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset("B/2", backbone_kwargs=switches)
    return sum(p.numel() for p in model.parameters())


def test_swiglu_has_as_many_parameters():
    for size in ("S/2", "B/2", "L/2", "XL/2"):
        with torch.device("meta"):
            gelu, swiglu = (
                SiTTransformer2DModel.from_preset(size, backbone_kwargs={"activation": name}).num_parameters()
                for name in ("gelu", "swiglu")
            )
        assert abs(swiglu / gelu - 1) < 1e-3


def test_switches_add_and_remove_the_parameters_they_should():
    base, blocks, width = count(), 12, 768
    assert base - count(layer_scale="none") == blocks * 2 * width
    assert count(layer_scale="gamma_only") - base == -blocks * 2 * width * (width + 1)
    assert count(norm="layer") == base
    assert count(affine_norms=True) - base == blocks * 2 * width
    assert count(affine_norms=True, norm="layer") - base == blocks * 4 * width
    assert base - count(absolute_position="none") == base - count(absolute_position="sincos_fixed") == 256 * width
    assert base - count(num_registers=0) == 4 * width
    assert base - count(qk_norm=False) == blocks * 2 * 64
    assert count(qkv_bias=True) - base == blocks * 3 * width
    assert count(rope=False) == count(register_rope=False) == base


TABLE = """
| vit5   | RMS   | GELU   | 1e-4 | learnable | 2-D | 4 (theta 100) | yes | no  |
| deit3  | Layer | GELU   | 1e-4 | learnable | no  | 0             | no  | yes |
| dinov2 | Layer | GELU   | 1e-5 | learnable | no  | 4 (none)      | no  | yes |
| dinov3 | Layer | GELU   | 1e-5 | none      | 2-D | 4 (none)      | no  | yes |
| llama  | RMS   | SwiGLU | none | none      | 2-D | 0             | no  | no  |
| qwen3  | RMS   | SwiGLU | none | none      | 2-D | 0             | yes | no  |
"""


def describe(backbone):
    """Read a row of the table off a built backbone."""
    block = backbone.blocks[0]
    scale = "none" if block.gamma_1 is None else f"{block.gamma_1[0].item():.0e}".replace("e-0", "e-")
    registers, theta = backbone.num_registers, backbone.register_theta
    return [
        {RMSNorm: "RMS", LayerNorm: "Layer"}[type(block.norm1)],
        {layers.Mlp: "GELU", layers.SwiGLU: "SwiGLU"}[type(block.mlp)],
        scale,
        "none" if backbone.pos_embed is None else "learnable" if backbone.pos_embed.requires_grad else "fixed",
        "no" if backbone.rope_theta is None else "2-D",
        f"{registers} ({'none' if theta is None else f'theta {theta:g}'})" if registers else "0",
        "yes" if isinstance(block.attn.q_norm, RMSNorm) else "no",
        "no" if block.attn.qkv.bias is None else "yes",
    ]


def test_named_variants_equal_the_table():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.split("\n") if line]
    assert [row[0] for row in rows] == list(VARIANTS)
    allowed = inspect.signature(ViT5Backbone).parameters
    for name, *cells in rows:
        assert VARIANTS[name].keys() <= allowed.keys()
        assert describe(make("vit5", activate=False, backbone_kwargs=VARIANTS[name]).backbone) == cells, name


# --- positions


def exact_rotation(x, row, column, theta):
    """Rotate one head vector in float64, pair by pair, straight from the definition."""
    x, half = x.double(), len(x) // 2
    out = x.clone()
    for start, position in ((0, row), (half, column)):
        for i in range(0, half, 2):
            angle = torch.tensor(position / theta ** (i / half), dtype=torch.float64)
            a, b = x[start + i], x[start + i + 1]
            out[start + i] = a * angle.cos() - b * angle.sin()
            out[start + i + 1] = a * angle.sin() + b * angle.cos()
    return out


@pytest.mark.parametrize(("grid", "built"), [((3, 5), (3, 5)), ((3, 5), (6, 4)), ((4, 2), (14, 14))])
def test_rope_equals_its_definition(grid, built):
    x = torch.randn(1, 1, grid[0] * grid[1] + 5, 24, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rope_table((Segment((1, 1)), Segment(grid, 10000.0, built), Segment((2, 2), 100.0)), 24, CPU))
    assert torch.equal(turned[0, 0, 0], x[0, 0, 0])
    for i in range(grid[0]):
        for j in range(grid[1]):
            n = 1 + i * grid[1] + j
            row, column = i / grid[0] * built[0], j / grid[1] * built[1]
            expected = exact_rotation(x[0, 0, n], row, column, 10000.0)
            torch.testing.assert_close(turned[0, 0, n].double(), expected, rtol=1e-5, atol=1e-5)
    for n in range(4):  # registers on their own 2x2 grid
        expected = exact_rotation(x[0, 0, n - 4], n // 2, n % 2, 100.0)
        torch.testing.assert_close(turned[0, 0, n - 4].double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_and_columns_are_not_swapped():
    """A query in the first half of the channels feels the row alone, one in the second half the column alone."""
    rope = rope_table((Segment((3, 5), 10000.0),), 16, CPU)
    for half, constant, varying in ((slice(0, 8), 1, 0), (slice(8, 16), 0, 1)):
        x = torch.zeros(1, 1, 15, 16)
        x[..., half] = 1
        turned = rotate(x, rope)[0, 0].unflatten(0, (3, 5))
        assert not turned.diff(dim=constant).any()
        assert turned.diff(dim=varying).abs().sum(-1).all()


def attention_logits(model, monkeypatch, rows=4, columns=6):
    """Logits (rows, columns, rows, columns) of the first block when the latents are the same everywhere."""
    seen = []

    def attention(q, k, v):
        seen.append(q @ k.transpose(-2, -1))
        return v

    monkeypatch.setattr(layers, "attention", attention)
    with torch.no_grad():
        model.backbone.blocks[0].attn.q_norm.weight.mul_(20)  # the tiny model's logits are near zero
        model(torch.ones(1, 4, 2 * rows, 2 * columns), torch.tensor([0.5]), torch.tensor([0]))
        model.backbone.blocks[0].attn.q_norm.weight.div_(20)
    n, grid = rows * columns, (rows, columns)
    return seen[0][0, 0, :n, :n].unflatten(1, grid).unflatten(0, grid)


@pytest.mark.parametrize(("position", "relative"), [("none", True), ("learnable", False), ("sincos_fixed", False)])
def test_logits_depend_on_relative_positions_only_without_ape(position, relative, monkeypatch):
    model = make("vit5", sample_size=(8, 12), backbone_kwargs={"absolute_position": position})
    logits = attention_logits(model, monkeypatch)
    shifted = torch.allclose(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, :-1, :-1], atol=1e-4)
    assert shifted == relative
    assert not torch.allclose(logits[0, 0, 0, 1], logits[0, 0, 1, 0], atol=1e-4)  # along a row is not down a column


def test_rotation_is_rescaled_to_the_grid_built_for(monkeypatch):
    model = make("vit5", sample_size=(8, 12), backbone_kwargs={"absolute_position": "none"})
    built, fed = attention_logits(model, monkeypatch), attention_logits(model, monkeypatch, 8, 12)
    torch.testing.assert_close(fed[::2, ::2, ::2, ::2], built, rtol=1e-4, atol=1e-4)


def test_registers_take_part_and_are_dropped_before_the_head():
    model = make("vit5", num_layers=1)
    backbone, tokens, c = model.backbone, torch.randn(2, 16, 48), torch.randn(2, 48)
    out = backbone(tokens, c, (4, 4))
    assert out.shape == tokens.shape
    backbone.reg_token.data += 1
    assert not torch.allclose(backbone(tokens, c, (4, 4)), out)
    torch.nn.init.zeros_(backbone.blocks[0].modulation.weight)
    torch.nn.init.zeros_(backbone.blocks[0].modulation.bias)
    assert torch.equal(backbone(tokens, c, (4, 4)), tokens + backbone.pos_embed)  # the patches, not the registers


def test_tables_stay_fp32_in_a_bf16_model():
    table = rope_table((Segment((64, 64), 100.0),), 16, CPU)
    assert table.dtype == torch.float32
    x = torch.ones(1, 1, 4096, 16)
    exact, low = rotate(x, table), rotate(x.to(torch.bfloat16), table)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 2**-7  # one rounding of the result, none of the angles


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norm_statistics_are_fp32(norm):
    x = (100 + torch.randn(4, 512, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    layer = norm(512, eps=1e-6)
    exact = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    torch.testing.assert_close(mixed.float(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer.to(torch.bfloat16)(x).float(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "width"),  # tables are remembered by their size, so each mode is the first to see its own
    [(torch.inference_mode, 18), (lambda: FakeTensorMode(allow_non_fake_inputs=True), 22)],
)
def test_tables_first_made_in_another_mode_serve_training(mode, width):
    model = make("vit5", sample_size=(14, width))
    with mode():
        model(*batch(height=14, width=width))
        model(*batch(height=10, width=width))
    model(*batch(height=10, width=width)).sum().backward()


def test_sincos_table_starts_with_columns():
    table = sincos_table(8, (2, 3)).unflatten(1, (2, 3))[0].double()
    omega = torch.tensor([1.0, 0.01], dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            parts = [f(p * omega) for p in (j, i) for f in (torch.sin, torch.cos)]
            torch.testing.assert_close(table[i, j], torch.cat(parts), rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 7), (2, 2)])
def test_resampling_equals_timm(grid):
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(0))
    expected = resample_abs_pos_embed(table, list(grid), [4, 4], num_prefix_tokens=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resample_positions(table, (4, 4), grid), expected, rtol=1e-5, atol=1e-6)
