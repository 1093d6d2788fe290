"""Vision models between published implementations, for other images, and over time, on one input."""

from __future__ import annotations

from pathlib import Path

import conversions_support as support
import pytest
import torch
from conversions_support import agree, all_seen, back, convert, hf, images, save, source, spec
from torch import nn

import ckptsurgeon as cs

pytest.importorskip("transformers")


def logits(model: nn.Module, image: torch.Tensor | None = None, **words: object) -> torch.Tensor:
    with torch.no_grad():
        found = model(images() if image is None else image, **words)
    return getattr(found, "logits", found)


# --- ViT: fused or split


def test_vit_with_a_fused_qkv_to_split_q_k_v(tmp_path: Path) -> None:
    given = source(spec("timm_vit"))
    path = save(given, tmp_path / "timm.safetensors")
    found, _ = convert(path, hf("vit"), tmp_path / "hf.safetensors", "timm_vit_to_hf_vit")
    agree(logits(found), logits(given))
    all_seen(found, logits, ["*.k_proj.bias"])


def test_vit_with_split_q_k_v_to_a_fused_qkv_and_back(tmp_path: Path) -> None:
    given = source(hf("vit"))
    path = save(given, tmp_path / "hf.pt")
    found, _ = convert(path, spec("timm_vit"), tmp_path / "timm.pt", "timm_vit_to_hf_vit", reverse=True)
    agree(logits(found), logits(given))
    convert(tmp_path / "timm.pt", hf("vit"), tmp_path / "back.pt", "timm_vit_to_hf_vit")
    support.same(support.load(tmp_path / "back.pt"), support.load(path))


@pytest.mark.slow
def test_vit_with_classes_of_its_own_by_the_command_line(tmp_path: Path) -> None:
    """The old head has 5 classes and does not fit; it is left behind, and the new one starts as the command line says."""
    given = source(spec("timm_vit"))
    save(given, tmp_path / "timm.pt")
    words = ("timm.pt", hf("vit(classes=7)"), "--init", "classifier.*", "zeros", "--rules", support.rules("timm_vit_to_hf_vit"))
    out = support.cli_json("merge", *words, "-o", "hf.pt", cwd=tmp_path)
    assert sorted(out["fresh"]) == ["classifier.bias", "classifier.weight"]
    assert sorted(row["source"] for row in out["dropped"]) == ["head.bias", "head.weight"]
    found = support.loaded(tmp_path / "hf.pt", hf("vit(classes=7)"))
    assert logits(found).abs().max() == 0
    with torch.no_grad():
        found.classifier, given.head = nn.Identity(), nn.Identity()
    agree(logits(found), logits(given))


def test_vit_whose_head_is_to_stay_as_the_target_has_it(tmp_path: Path) -> None:
    """The head would fit; a rule beside the file's says that it is not wanted."""
    given = source(spec("timm_vit"))
    path = save(given, tmp_path / "timm.pt")
    new, old = ["classifier.weight", "classifier.bias"], ["head.weight", "head.bias"]
    found, _ = convert(path, hf("vit"), tmp_path / "hf.pt", "timm_vit_to_hf_vit", keep=["classifier.*"], fresh=new, dropped=old)
    assert found.classifier.bias.abs().max() == 0  # transformers' own initial value
    found.classifier, given.head = nn.Identity(), nn.Identity()
    agree(logits(found), logits(given))


# --- ViT, DINOv2, BEiT: another resolution


def test_vit_at_another_resolution_as_it_interpolates_itself(tmp_path: Path) -> None:
    given = source(hf("vit"))
    found, _ = convert(save(given, tmp_path / "small.pt"), hf("vit(image=56)"), tmp_path / "large.pt", "vit_larger_images")
    larger = images(56)
    agree(logits(found, larger), logits(given, larger, interpolate_pos_encoding=True))


def test_dinov2_at_another_resolution_as_it_interpolates_itself(tmp_path: Path) -> None:
    given = source(hf("dinov2"))
    found, _ = convert(
        save(given, tmp_path / "small.safetensors"), hf("dinov2(image=42)"), tmp_path / "large.safetensors", "vit_larger_images"
    )
    larger = images(42)
    with torch.no_grad():
        # transformers interpolates DINOv2's in float32, whatever the model's dtype
        agree(found(larger).last_hidden_state, given(larger).last_hidden_state, 1e-5)


def test_vit_fused_and_at_another_resolution_by_two_files_of_rules(tmp_path: Path) -> None:
    given = source(spec("timm_vit"))
    path = save(given, tmp_path / "timm.pt")
    found, _ = convert(path, hf("vit(image=48)"), tmp_path / "hf.pt", ["timm_vit_to_hf_vit", "vit_larger_images"])
    small, _ = convert(path, hf("vit"), tmp_path / "small.pt", "timm_vit_to_hf_vit")
    larger = images(48)
    agree(logits(found, larger), logits(small, larger, interpolate_pos_encoding=True))


def test_beit_with_another_window_as_it_interpolates_itself(tmp_path: Path) -> None:
    given = source(hf("beit"))
    found, _ = convert(save(given, tmp_path / "small.pt"), hf("beit(image=48)"), tmp_path / "large.pt", "beit_larger_images")
    larger = images(48)
    agree(logits(found, larger), logits(given, larger), 1e-5)  # its softmax is in float32
    all_seen(found, lambda model: logits(model, larger), within=1e-6)


# --- ResNet


@pytest.mark.parametrize("deep", [False, True], ids=["basic", "bottleneck"])
def test_resnet_to_transformers_names_and_back(deep: bool, tmp_path: Path) -> None:
    given = source(spec(f"resnet(deep={deep})"))
    path = save(given, tmp_path / "tv.pth")
    found, _ = convert(path, hf(f"resnet(deep={deep})"), tmp_path / "hf.safetensors", "resnet_to_hf")
    agree(logits(found, images(64)), logits(given, images(64)))
    all_seen(found, lambda model: logits(model, images(48)[:1]), ["*.num_batches_tracked"])
    back(tmp_path / "hf.safetensors", spec(f"resnet(deep={deep})"), tmp_path / "back.pth", "resnet_to_hf", path)


def test_resnet_for_grey_images(tmp_path: Path) -> None:
    given = source(spec("resnet"))
    found, report = convert(save(given, tmp_path / "rgb.pth"), spec("resnet(in_channels=1)"), tmp_path / "grey.pth", "resnet_grey")
    grey = images(64, channels=1)
    agree(logits(found, grey), logits(given, grey.expand(-1, 3, -1, -1)))
    assert "conv1.weight" in report.transferred


def test_resnet_for_images_with_six_channels(tmp_path: Path) -> None:
    """Two RGB images as one: with the same image twice, the answer is the old one."""
    given = source(spec("resnet"))
    found, _ = convert(save(given, tmp_path / "rgb.pth"), spec("resnet(in_channels=6)"), tmp_path / "six.pth", "resnet_grey")
    agree(logits(found, torch.cat((images(64), images(64)), 1)), logits(given, images(64)))


def test_resnet_for_grey_images_by_its_trainer(tmp_path: Path) -> None:
    """A trainer's file: a DataParallel model under `state_dict`, its epoch beside it."""
    given = source(spec("resnet"))
    torch.save(
        {"epoch": 7, "state_dict": {f"module.{key}": tensor for key, tensor in given.state_dict().items()}}, tmp_path / "checkpoint.pth.tar"
    )
    found, _ = convert(tmp_path / "checkpoint.pth.tar", spec("resnet(in_channels=1)"), tmp_path / "grey.safetensors", "resnet_grey")
    grey = images(64, channels=1)
    agree(logits(found, grey), logits(given, grey.expand(-1, 3, -1, -1)))


def test_resnet_that_moco_trained(tmp_path: Path) -> None:
    """As published: a DistributedDataParallel model's state_dict, both encoders in it, beside the optimizer's state."""
    trained, average = source(spec("resnet"), 1), source(spec("resnet"), 2)
    state = {
        f"module.encoder_{tower}.{key}": one for tower, net in (("q", trained), ("k", average)) for key, one in net.state_dict().items()
    }
    for tower in "qk":
        for place in (0, 2):
            state[f"module.encoder_{tower}.fc.{place}.weight"] = torch.ones(4, 4)
        del state[f"module.encoder_{tower}.fc.weight"], state[f"module.encoder_{tower}.fc.bias"]
    state |= {"module.queue": torch.ones(4, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    path = tmp_path / "moco_v2.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    left = {key for key in state if "encoder_q" not in key or ".fc." in key}
    found, _ = convert(path, spec("resnet"), tmp_path / "out.pth", "moco_to_resnet", fresh=["fc.weight", "fc.bias"], dropped=left)
    assert found.fc.bias.abs().max() == 0
    assert 0 < found.fc.weight.std() < 0.02
    found.fc, trained.fc = nn.Identity(), nn.Identity()
    agree(logits(found, images(64)), logits(trained, images(64)))


# --- 2-D to 3-D, linear to convolution


def test_a_network_for_frames_over_clips(tmp_path: Path) -> None:
    given = source(spec("frame_net"))
    found, _ = convert(save(given, tmp_path / "frames.pt"), spec("video_net"), tmp_path / "video.pt", "frames_to_video")
    still = images().unsqueeze(2).expand(-1, -1, 7, -1, -1)
    with torch.no_grad():
        clip = found(still)
        agree(clip, given(images()).unsqueeze(1).expand(-1, 3, -1))
        moving = torch.stack([images(seed=seed) for seed in range(7)], 2)
        assert (found(moving)[:, 0] - given(images(seed=2))).abs().max() > 0.01  # it does look at its neighbours


def test_a_network_for_frames_over_clips_at_the_middle(tmp_path: Path) -> None:
    """With `center` every moment of a clip, moving or not, gives what its frame gave."""
    given = source(spec("frame_net"))
    path = save(given, tmp_path / "frames.pt")
    support.account(cs.merge(path, spec("video_net"), tmp_path / "video.pt", adapt=[("conv*.weight", "inflate(mode='center')")]))
    found = support.loaded(tmp_path / "video.pt", spec("video_net"))
    moving = torch.stack([images(seed=seed) for seed in range(7)], 2)
    with torch.no_grad():
        agree(found(moving), torch.stack([given(images(seed=seed)) for seed in (2, 3, 4)], 1))


def test_linear_layers_as_convolutions_and_back(tmp_path: Path) -> None:
    given = source(spec("vgg"))
    path = save(given, tmp_path / "vgg.safetensors")
    found, _ = convert(path, spec("vgg(sliding=True)"), tmp_path / "sliding.safetensors", "vgg_sliding")
    image = images(18)
    agree(logits(found, image).flatten(1), logits(given, image))
    larger = images(26)
    agree(logits(found, larger)[:, :, 1, 2], logits(given, larger[:, :, 4:22, 8:26]))  # one of 3 x 3 places
    back(tmp_path / "sliding.safetensors", spec("vgg"), tmp_path / "back.safetensors", "vgg_sliding", path)
