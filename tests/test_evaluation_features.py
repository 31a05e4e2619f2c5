import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation_card import pictures
from torch import nn

from vit5gen.evaluation import frechet_distance, frechet_of, load_extractor
from vit5gen.evaluation.features import load_weights
from vit5gen.system.errors import UserError


@pytest.fixture(scope="module")
def effnet():
    return load_extractor("effnet-lite0")


def test_effnet_is_a_working_classifier_backbone(effnet) -> None:
    assert (effnet.name, effnet.metric, effnet.dim) == ("EffNetLite0@96", "FD-EffNetLite0@96", 1280)
    assert effnet.licences == {"EffNetLite0@96": "Apache-2.0"}
    features = effnet(pictures(4)).pooled
    assert features.shape == (4, 1280)
    assert features.dtype == torch.float32
    assert features.std(dim=0).mean() > 0.05  # trained weights tell the pictures apart


def test_flops_are_twice_the_products_of_weights(effnet) -> None:
    products, handles = [], []
    for module in effnet.network.modules():
        if isinstance(module, nn.Conv2d):

            def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                products.append(module.weight.numel() * output.shape[2:].numel())

            handles.append(module.register_forward_hook(note))
    effnet(pictures(1, side=32))
    for handle in handles:
        handle.remove()
    assert len(products) == 49
    assert load_extractor("effnet-lite0", "meta").flops(32) == 2 * sum(products)  # whatever the side: resized to 96


def test_effnet_resize_is_the_identity_at_96_pixels(effnet) -> None:
    images = pictures(2, side=96)
    with torch.no_grad():
        expected = effnet.network(images.float() / 127.5 - 1)
    torch.testing.assert_close(effnet(images).pooled, expected, rtol=0, atol=0)


def test_effnet_shrinks_images_with_an_antialiased_filter(effnet) -> None:
    images = torch.randint(0, 256, (2, 3, 200, 200), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    # Pillow's float images are resized with the same triangle filter, widened by the scale.
    planes = [
        Image.fromarray(plane.float().numpy()).resize((96, 96), Image.Resampling.BILINEAR)
        for plane in images.flatten(0, 1)
    ]
    pixels = torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).view(2, 3, 96, 96)
    with torch.no_grad():
        expected = effnet.network(pixels / 127.5 - 1)
    torch.testing.assert_close(effnet(images).pooled, expected, rtol=1e-3, atol=1e-4)


def test_distance_in_effnet_features_grows_with_noise(effnet) -> None:
    images = pictures(24)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    reference = frechet_of(images.split(10), effnet)
    distances = []
    for amount in (0, 10, 40):
        noisy = (images + amount * noise).clamp(0, 255).to(torch.uint8)
        generated = frechet_of(noisy.split(10), effnet)
        distances.append(frechet_distance(generated.mean, generated.covariance, reference.mean, reference.covariance))
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2]


def test_autocast_and_tf32_around_the_extractor_change_nothing(effnet) -> None:
    images, before = pictures(2), torch.get_float32_matmul_precision()
    expected = effnet(images).pooled
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = effnet(images).pooled
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_bad_images_and_weights_are_errors_of_one_line(effnet, tmp_path) -> None:
    for images in (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8), pictures(1)[0]):
        with pytest.raises(UserError, match=r"expected torch.uint8 \(B, 3, H, W\)"):
            effnet(images)
    with pytest.raises(UserError, match="Did you mean 'effnet-lite0'"):
        load_extractor("efnet-lite0")
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"weights.pth: sha256 .* expected 57934424"):
        load_extractor("effnet-lite0", weights=tmp_path / "weights.pth")
    with pytest.raises(UserError, match="is not a file"):
        load_weights(tmp_path / "absent.pth", "00")


def test_batch_size_moves_the_distance_by_less_than_1e_4(effnet) -> None:
    images, real = pictures(24), frechet_of([pictures(24, seed=1)], effnet)
    values = []
    for size in (24, 7, 1):
        found = frechet_of(images.split(size), effnet)
        values.append(frechet_distance(found.mean, found.covariance, real.mean, real.covariance))
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-4)
