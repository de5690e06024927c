"""SSBA: the secret's code, the encoder and its training, and the trigger that it makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bbfast
from bbfast.attacks import AttackContext, AttackResult, create, ssba
from bbfast.attacks._bch import bch_generator, bch_parity, text_bits
from bbfast.attacks._encoding import steps_to_epochs
from bbfast.attacks._similarity import perceptual_distance, ssim
from bbfast.attacks._ssba_nets import Critic, SecretDecoder, SecretEncoder, Stego
from bbfast.attacks._ssba_training import StegoProgram, obtain_stego, read_back
from bbfast.attacks.prerequisites import default_context
from bbfast.data import DataPair, ImageSet
from bbfast.data.loader import Batch
from bbfast.errors import ConfigError
from bbfast.store import Store

TINY = {"encoder_epochs": 1, "encoder_batch_size": 16, "secret_bits": 8}


@pytest.fixture
def context(tmp_path: Path, make_set) -> AttackContext:
    data = make_set(64, 16)
    return dataclasses.replace(default_context(data, 10), store=Store(tmp_path / "made"), progress=False)


def prepared(context: AttackContext, data: ImageSet, **settings):
    attack = create("ssba", **{**TINY, **settings})
    attack.prepare(data, 10, 0, context)
    return attack


# The code of the secret -----------------------------------------------------------------------------------------------


def test_generators_are_the_published_ones() -> None:
    """Lin and Costello, Error Control Coding, table of primitive BCH codes of length 127, in octal."""
    published = {1: 0o211, 2: 0o41567, 3: 0o11554743, 4: 0o3447023271, 5: 0o624730022327}
    assert {t: bch_generator(t) for t in published} == published


def test_code_words_are_multiples_of_the_generator() -> None:
    for text, t in (("a      ", 5), ("secret!", 5), ("xYz9", 2)):
        parity = bch_parity(text.encode(), t)
        divisor = [int(bit) for bit in f"{bch_generator(t):b}"]
        checks = len(divisor) - 1
        word = [int(bit) for byte in text.encode() + parity for bit in f"{byte:08b}"]
        word, padding = word[: 8 * len(text) + checks], word[8 * len(text) + checks :]
        assert not any(padding)
        for i in range(len(word) - checks):  # long division, one coefficient after the other
            if word[i]:
                word[i : i + len(divisor)] = [a ^ b for a, b in zip(word[i:], divisor, strict=False)]
        assert not any(word)


def test_check_bytes_are_those_of_bchlib() -> None:
    """bchlib 2.1.3, BCH(t, prim_poly=137).encode, which the published encoder uses."""
    assert bch_parity(b"a      ", 5).hex() == "8693e147e0" and bch_parity(b"xYz9   ", 5).hex() == "f84e91ba20"
    assert bch_parity(b"a   ", 2).hex() == "7f80" and bch_parity(b"xYz9", 2).hex() == "e5dc"


def test_text_as_bits() -> None:
    bits = text_bits("a", 100)
    assert bits.shape == (100,) and bits[:8].tolist() == [0, 1, 1, 0, 0, 0, 0, 1] and not bits[91:].any()
    assert bits[8:16].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert text_bits("a", 50).shape == (50,) and not text_bits("a", 50)[46:].any()


def test_seed_mode_hides_random_bits(context: AttackContext, make_set) -> None:
    data = make_set(32, 16)
    secret = prepared(context, data, secret_bits=20).tensors["secret"]
    assert secret.shape == (20,) and 4 < secret.sum() < 16
    other = create("ssba", **{**TINY, "secret_bits": 20})
    other.prepare(data, 10, 1, context)
    assert not torch.equal(other.tensors["secret"], secret)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"secret": "too long"}, "secret must be at most 7 ASCII characters for 100 bits, got 'too long'"),
        ({"secret": "fünf"}, "secret must be at most 7 ASCII characters for 100 bits, got 'fünf'"),
        ({"secret": "abcde", "secret_bits": 50}, "secret must be at most 4 ASCII characters for 50 bits"),
        ({"secret_mode": "text", "secret_bits": 30}, "a text needs secret_bits 100 or 50, got 30"),
        ({"secret_mode": "text", "loss": "issba"}, "a text needs secret_bits 100 or 50, got 20"),
        ({"encoder_epochs": 0}, "encoder_epochs"),
        ({"loss": "lpips"}, "loss"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create("ssba", **settings)


def test_sizes_that_the_encoder_cannot_take(make_set) -> None:
    with pytest.raises(ValueError, match="ssba: height and width must be multiples of 16, got 28 x 28"):
        create("ssba").poison(make_set(20, 28))


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 16, 48), (3, 64, 32)])
def test_networks_take_every_size(channels: int, height: int, width: int) -> None:
    stego = Stego(SecretEncoder(12, channels), SecretDecoder(12, (channels, height, width)))
    coded, logits = stego(torch.rand(2, channels, height, width), torch.ones(1, 12))
    assert coded.shape == (2, channels, height, width) and logits.shape == (2, 12)
    assert coded.min() > 0 and coded.max() < 1


def test_sizes_of_the_published_networks() -> None:
    encoder, decoder = SecretEncoder(100), SecretDecoder(100, (3, 32, 32))
    assert encoder.secret.out_features == 3 * 16 * 16 and encoder.conv9.in_channels == 70
    dense = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [(128, 512), (512, 100)]


def test_encoder_is_differentiable_in_image_and_secret() -> None:
    torch.manual_seed(0)
    encoder = SecretEncoder(6, 1).double()
    x, secret = torch.rand(1, 1, 16, 16).double().requires_grad_(), torch.rand(1, 6).double().requires_grad_()
    encoder(x, secret).square().sum().backward()
    for value in (x, secret):
        moved = torch.zeros_like(value)
        moved.view(-1)[3] = 1e-6
        with torch.no_grad():
            shifted = [
                encoder(x + s * moved, secret) if value is x else encoder(x, secret + s * moved) for s in (1, -1)
            ]
            slope = (shifted[0].square().sum() - shifted[1].square().sum()) / 2e-6
        assert value.grad is not None and torch.isclose(value.grad.view(-1)[3], slope, rtol=1e-4, atol=1e-7)


def test_a_residual_encoder_starts_from_the_image() -> None:
    encoder = SecretEncoder(8, residual=True, centred=True)
    torch.nn.init.zeros_(encoder.out.weight)
    torch.nn.init.zeros_(encoder.out.bias)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(encoder(x, torch.ones(1, 8)), x)
    torch.nn.init.constant_(encoder.out.bias, 2.0)
    assert torch.equal(encoder(x, torch.ones(1, 8)), torch.ones_like(x))


# Training -------------------------------------------------------------------------------------------------------------


def started(config: ssba.SSBA.Config, data: ImageSet) -> StegoProgram:
    program = StegoProgram(config, Critic(data.image_size[0]) if config.loss == "issba" else None)
    program.start(torch.nn.Identity(), data, bbfast.Recipe(), 0, torch.device("cpu"))
    return program


def test_the_images_weight_waits_for_the_secret_and_then_rises(make_set) -> None:
    data = make_set(8, 16)
    program = started(create("ssba", secret_bits=4, secret_steps=100, ramp_steps=300).config, data)
    batch = Batch(data.images.float() / 255, data.labels, data.ids)

    class Reads(torch.nn.Module):
        right = False

        def forward(self, x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
            return x + 0.5, (20 * bits - 10) * (1 if self.right else -1)

    model, weights = Reads(), []
    for step in range(412):
        model.right = step == 2  # a batch read well starts the count; it does not stop when one is read badly
        program.make_batch(batch)
        loss, _ = program.loss(model, batch)
        weights.append(round((float(loss) - (0.0 if model.right else 10.0)) / 0.25, 2))
    assert weights[:102] == [0.0] * 102
    assert weights[2 + 150 - 1] == pytest.approx(10 * 50 / 300, abs=0.02) and weights[-1] == 10


def test_bits_depend_on_epoch_and_sample_alone(make_set) -> None:
    data = make_set(8, 16)
    program = started(create("ssba", secret_bits=100).config, data)
    x = data.images.float() / 255
    program.make_batch(Batch(x, data.labels, data.ids, epoch=1))
    whole = program.bits
    program.make_batch(Batch(x[[5, 2]], data.labels[[5, 2]], torch.tensor([5, 2]), epoch=1))
    assert torch.equal(program.bits, whole[[5, 2]]) and 0.4 < whole.mean() < 0.6
    program.make_batch(Batch(x, data.labels, data.ids, epoch=2))
    assert not torch.equal(program.bits, whole)


def test_small_sets_get_the_steps_of_the_paper() -> None:
    assert steps_to_epochs(15_600, 50_000, 64) == 20
    assert steps_to_epochs(15_600, 1442, 64) == 679
    assert create("ssba").config.schedule().epochs == 20
    assert create("ssba", encoder_epochs=3).config.schedule().steps == 0


def test_a_killed_training_goes_on_to_the_same_weights(
    context: AttackContext, make_set, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = make_set(48, 16), create("ssba", **{**TINY, "encoder_epochs": 3, "loss": "issba"}).config
    whole, _ = obtain_stego(dataclasses.replace(context, store=None), data, config, 0)
    plain, calls = StegoProgram.epoch_end, []

    def dies(self: StegoProgram, epoch: int, model: torch.nn.Module) -> dict[str, float]:
        calls.append(epoch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, epoch, model)

    monkeypatch.setattr(StegoProgram, "epoch_end", dies)
    monkeypatch.setattr("bbfast.training.checkpoint._LARGEST_SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt):
        obtain_stego(context, data, config, 0)
    again, _ = obtain_stego(context, data, config, 0)
    assert calls == [0, 1, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_papers_loss_trains_its_critic(make_set) -> None:
    data = make_set(8, 16)
    program = started(create("ssba", loss="issba", secret_steps=1, ramp_steps=0).config, data)
    batch = Batch(data.images.float() / 255, data.labels, data.ids)
    torch.manual_seed(0)
    model = Stego(SecretEncoder(20, residual=True, centred=True), SecretDecoder(20, data.image_size))
    assert program.adversary is not None
    program.make_batch(batch)
    first, _ = program.loss(model, batch)
    coded, logits = model(batch.x, program.bits)
    secret = torch.nn.functional.binary_cross_entropy_with_logits(logits, program.bits)
    assert torch.isclose(first, 1.5 * secret)  # the image does not count yet
    second, _ = program.loss(model, batch)
    image = 2 * (coded - batch.x).square().mean() + 1.5 * perceptual_distance(coded, batch.x)
    assert torch.isclose(second, image + 1.5 * secret + 0.5 * program.adversary.network(coded).mean(), rtol=1e-4)
    second.backward()
    assert all(p.grad is None for p in program.adversary.network.parameters())
    program.after_step(model)
    assert all(p.abs().max() <= 0.01 for p in program.adversary.network.parameters())
    saved = {name: value.clone() for name, value in program.state().items()}
    other = started(program.config, data)
    other.load_state(saved)
    assert other.count == 2 and all(torch.equal(value, saved[name]) for name, value in other.state().items())


def test_critic_scores_patches() -> None:
    assert Critic(3)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 2, 2)


def test_ssim() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 20, 20), torch.rand(2, 3, 20, 20)
    assert torch.allclose(ssim(a, a), torch.ones(2)) and ssim(a, b).abs().max() < 0.1
    # Constant images: only the term of the means is left.
    dark, bright = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    assert torch.isclose(ssim(dark, bright), torch.tensor((2 * 0.12 + 1e-4) / (0.4 + 1e-4)), atol=1e-4).all()
    assert perceptual_distance(a, a) < 1e-6 < perceptual_distance(a, b)


# The attack -----------------------------------------------------------------------------------------------------------


def test_one_encoder_serves_all_ratios_modes_and_secrets(context: AttackContext, make_set) -> None:
    data = make_set(40, 16)
    first = prepared(context, data, secret_bits=50, secret="a")
    prepared(context, data, secret_bits=50, secret="b", ratio=0.3, label_mode="all2all")
    assert context.store is not None and len(context.store.list("prerequisite", "ssba_encoder")) == 1
    prepared(context, data, secret_bits=50, encoder_lr=2e-4)
    assert len(context.store.list("prerequisite", "ssba_encoder")) == 2
    assert not any("decoder" in name for name in first.tensors)


def test_secrets_make_different_images(context: AttackContext, make_set) -> None:
    data = make_set(20, 16)
    one, other = (prepared(context, data, secret_bits=50, secret=text) for text in ("a", "b"))
    assert not torch.equal(one.trigger(data.images), other.trigger(data.images))


def test_float_images_keep_their_gradient_and_type(context: AttackContext, make_set) -> None:
    data = make_set(20, 16)
    attack = prepared(context, data)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = (data.images[:2].to(dtype) / 255).requires_grad_()
        out = attack.trigger(x)
        out.sum().backward()
        assert out.dtype == dtype and x.grad is not None and x.grad.abs().sum() > 0
    assert attack.trigger(torch.rand(0, 3, 16, 16)).shape == (0, 3, 16, 16)


def test_both_modes_make_the_same_images(context: AttackContext, make_set) -> None:
    data = make_set(20, 16)
    paper, reference = (prepared(context, data, compat=mode) for mode in ("paper", "reference"))
    assert torch.equal(paper.trigger(data.images), reference.trigger(data.images))


def test_a_result_takes_its_encoder_along(context: AttackContext, make_set, tmp_path: Path) -> None:
    data = DataPair(make_set(48, 16), make_set(20, 16, seed=1), num_classes=10)
    recipe = bbfast.Recipe.preset("quick", epochs=1)
    made = create("ssba", **TINY)
    result = bbfast.attack(made, data, "small_cnn", recipe, device="cpu", store=context.store, progress=False)
    result.save(tmp_path / "run")
    loaded = AttackResult.load(tmp_path / "run")
    assert torch.equal(loaded.backdoor_test.images, loaded.trigger(data.test.images[data.test.labels != 0]))
    # ... and it can be given to another attack.
    own = create("ssba", **TINY, encoder_path=tmp_path / "run" / "trigger.safetensors")
    own.prepare(make_set(48, 16, seed=5), 10, 0, dataclasses.replace(context, store=None))
    assert torch.equal(own.trigger(data.test.images), loaded.trigger(data.test.images))
    assert own.files().keys() == {str(tmp_path / "run" / "trigger.safetensors")}


def test_encoders_that_do_not_fit(context: AttackContext, make_set, tmp_path: Path) -> None:
    data, path = make_set(20, 16), tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match=r"encoder_path .* does not exist"):
        prepared(context, data, encoder_path=path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        prepared(context, data, encoder_path=path)
    save_file(SecretEncoder(9).state_dict(), path)
    with pytest.raises(ValueError, match=r"secret.weight \(expected \[768, 8\], got \[768, 9\]\)"):
        prepared(context, data, encoder_path=path)
    save_file(SecretEncoder(8).state_dict(), path)
    prepared(context, data, encoder_path=path)


def test_an_encoder_that_learned_little_is_reported(
    context: AttackContext, make_set, caplog: pytest.LogCaptureFixture
) -> None:
    attack = prepared(context, make_set(20, 16))
    assert "of the bits right after 1 epochs; raise encoder_epochs" in caplog.text
    assert 0.3 < float(attack.tensors["bit_accuracy"]) < 0.9 and float(attack.tensors["psnr"]) > 3


def test_the_secret_is_learned(context: AttackContext, make_set) -> None:
    """A few seconds of the quick schedule read a short secret from images that still look like what they were."""
    data = make_set(160, 16, channels=1)
    settings = {"encoder_preset": "quick", "secret_bits": 4, "encoder_epochs": 16, "secret_steps": 10, "ramp_steps": 30}
    stego, measured = obtain_stego(context, data, create("ssba", **settings).config, 0)
    fresh = make_set(100, 16, channels=1, seed=7).images
    accuracy, quality = read_back(stego, fresh)
    assert accuracy > 0.9 and quality > 12
    assert float(measured["bit_accuracy"]) > 0.9


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_digits_meet_the_acceptance_of_the_spec() -> None:
    data = bbfast.datasets.load("digits")
    attack = create("ssba", encoder_preset="quick")
    store = Store(Path(bbfast.data.cache.cache_root() or ".") / "prerequisites")
    result = bbfast.attack(attack, data, "small_cnn", "quick", device="cpu", store=store, progress=False)
    context = dataclasses.replace(default_context(data.train, 10), store=store, test=data.test, progress=False)
    _, measured = obtain_stego(context, data.train, attack.config, 0)  # type: ignore[arg-type]
    assert float(measured["bit_accuracy"]) > 0.99 and float(measured["psnr"]) >= 25
    clean = data.test.images[:100]
    change = (result.trigger(clean).float() - clean.float()) / 255
    assert float(ssim(clean.float() / 255, clean.float() / 255 + change).mean()) >= 0.9
    assert abs(float(torch.corrcoef(change[:2].flatten(1))[0, 1])) < 0.9
    assert result.metrics["asr"] > 0.9 and result.metrics["c_acc"] > 0.95
