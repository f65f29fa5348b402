"""The method in its plainest form: maps materialised, L×L products, loops over patches, separate forwards.

Nothing here is shared with the fast path but the parameters' names and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tower(
    p: dict[str, Tensor], pixels: Tensor, *, layers: int, heads: int, patch: int, quick: bool, keep=None, hidden=None
):
    """Features, attention maps and the last block's ln_1 output of an open_clip ViT, from its state dict ``p``."""
    get = lambda key: p[f"visual.{key}"]  # noqa: E731
    width = get("class_embedding").shape[0]
    norm = lambda x, key: F.layer_norm(x, (width,), get(f"{key}.weight"), get(f"{key}.bias"))  # noqa: E731
    x = F.conv2d(pixels, get("conv1.weight"), stride=patch).flatten(2).transpose(1, 2)
    n = len(x)
    x = torch.cat([get("class_embedding").expand(n, 1, width), x], 1) + get("positional_embedding")
    if "visual.ln_pre.weight" in p:
        x = norm(x, "ln_pre")
    if keep is not None:
        x = torch.stack([torch.cat([x[i, :1], x[i, 1:][keep[i]]]) for i in range(n)])
    maps = []
    normed = x
    for layer in range(layers):
        b = f"transformer.resblocks.{layer}."
        h = normed = norm(x, b + "ln_1")
        q, k, v = (h @ get(b + "attn.in_proj_weight").T + get(b + "attn.in_proj_bias")).chunk(3, -1)
        split = lambda t: t.reshape(n, -1, heads, width // heads).transpose(1, 2)  # noqa: E731
        q, k, v = split(q), split(k), split(v)
        scores = q @ k.transpose(2, 3) / (width // heads) ** 0.5
        if hidden is not None:
            for i in range(n):
                for j in range(hidden.shape[1]):
                    if hidden[i, j]:
                        scores[i, :, :, j + 1] = -torch.inf
        attention = scores.softmax(-1)
        maps.append(attention)
        o = (attention @ v).transpose(1, 2).reshape(n, -1, width)
        x = x + o @ get(b + "attn.out_proj.weight").T + get(b + "attn.out_proj.bias")
        h = norm(x, b + "ln_2") @ get(b + "mlp.c_fc.weight").T + get(b + "mlp.c_fc.bias")
        h = h * torch.sigmoid(1.702 * h) if quick else F.gelu(h)
        x = x + h @ get(b + "mlp.c_proj.weight").T + get(b + "mlp.c_proj.bias")
    x = norm(x, "ln_post")
    return x[:, 0] @ get("proj"), maps, normed


def logits(p: dict[str, Tensor], features: Tensor) -> Tensor:
    unit = features / features.pow(2).sum(1, keepdim=True).sqrt()
    return unit @ p["head.weight"].T + p["head.bias"]


def relevance(target: Tensor, maps: list[Tensor], first_block: int = 0) -> Tensor:
    """R = (I + A_D) … (I + A_1), with L×L products; the class token's row, patches only."""
    gradients = torch.autograd.grad(target.sum(), maps, retain_graph=True)
    length = maps[0].shape[-1]
    product = torch.eye(length, dtype=target.dtype).expand(len(target), length, length)
    for attention, gradient in list(zip(maps, gradients, strict=True))[first_block:]:
        a = (attention * gradient).clamp(min=0).mean(1)
        product = (torch.eye(length, dtype=target.dtype) + a) @ product
    return product[:, 0, 1:].detach()


def grad_cam(target: Tensor, normed: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(target.sum(), normed, retain_graph=True)
    rows = []
    for activation, cotangent in zip(normed, gradient, strict=True):
        weight = sum(cotangent[token] for token in range(len(cotangent)))
        rows.append(
            torch.stack([(weight * activation[token]).sum().clamp(min=0) for token in range(1, len(activation))])
        )
    return torch.stack(rows).detach()


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student), from the definition of KL."""
    p, q = ((z / temperature).softmax(1) for z in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def mask_of(method, cam, draws, n, patches):
    """The (N, P) mask, image by image and patch by patch."""
    mask = torch.zeros(n, patches, dtype=torch.bool)
    for i in range(n):
        for j in range(patches):
            if draws.keep is not None:
                mask[i, j] = j not in draws.keep[i].tolist()
            elif method.mask == "random":
                mask[i, j] = draws.mask[i, j]
            else:
                over = cam[i, j] / (cam[i].max() + 1e-8) > method.threshold
                mask[i, j] = over if method.mask == "object" else not over
    return mask


def fill(images: Tensor, mask: Tensor, donors: Tensor, patch: int) -> Tensor:
    columns = images.shape[3] // patch
    out = images.clone()
    for i in range(len(images)):
        for j in range(mask.shape[1]):
            if mask[i, j]:
                donor = donors[i] if donors.dim() == 1 else donors[i, j]
                top, left = (j // columns) * patch, (j % columns) * patch
                out[i, :, top : top + patch, left : left + patch] = images[
                    donor, :, top : top + patch, left : left + patch
                ]
    return out


def step(p, teacher, images, labels, draws, method, *, mean, std, layers, heads, patch, quick, ensemble=None):
    """Losses, CAM, mask, counterfactual images, and gradients of every parameter in ``p`` (leaves).

    teacher, ensemble: state dicts of tower and head, like ``p``.
    """
    shape = dict(layers=layers, heads=heads, patch=patch, quick=quick)
    prepare = lambda x: (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)  # noqa: E731
    features, maps, normed = tower(p, prepare(images), **shape)
    z = logits(p, features)
    result = dict(ce=-(z.log_softmax(1)[torch.arange(len(z)), labels]).mean())
    if method.name == "wise-kd":
        with torch.no_grad():
            answer = logits(ensemble, tower(ensemble, prepare(images), **shape)[0])
        result["kd"] = kd(z, answer, method.temperature)
    if method.distils:
        cf, keep, hidden = images, None, None
        if method.masked:
            cam = None
            if method.mask != "random":
                target = z[torch.arange(len(z)), labels]
                cam = (
                    grad_cam(target, normed)
                    if method.cam == "grad-cam"
                    else relevance(target, maps, method.first_block)
                )
            patches = p["visual.positional_embedding"].shape[0] - 1
            mask = mask_of(method, cam, draws, len(images), patches)
            cf = images if method.fill == "no-fill" else fill(images, mask, draws.donors, patch)
            keep = draws.keep
            hidden = mask if method.fill == "no-fill" and keep is None else None
            result |= dict(cam=cam, mask=mask, cf=cf)
        with torch.no_grad():
            wanted = tower(teacher, prepare(cf), **shape, keep=keep, hidden=hidden)[0]
            wanted_logits = logits(teacher, wanted)
        got = tower(p, prepare(cf), **shape, keep=keep, hidden=hidden)[0]
        if method.name == "kd":
            result["kd"] = kd(logits(p, got), wanted_logits, method.temperature)
        else:
            scale = 1 if method.beta_relative is None else (wanted**2).mean(1, keepdim=True)
            result["mse"] = ((got - wanted) ** 2 / scale).mean()
    beta = method.beta_relative or method.beta or 0
    result["loss"] = result["ce"] + (method.gamma or 0) * result.get("kd", 0) + beta * result.get("mse", 0)
    result["loss"].backward()
    return {name: value if value is None else value.detach() for name, value in result.items()}
