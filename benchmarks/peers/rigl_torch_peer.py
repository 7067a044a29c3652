"""`rigl-torch`: RigL for PyTorch, by a scheduler around the optimizer."""

import sys
import types
from importlib import metadata

import measuring
import torch
import torch_networks as networks
from measuring import DROP_FRACTION, SPARSITY, UPDATES
from torch import nn

# It imports torchvision only to recognize its ResNet blocks; there is none for this CPU build.
resnet = types.ModuleType("torchvision.models.resnet")
resnet.Bottleneck = resnet.BasicBlock = type("Missing", (nn.Module,), {})
torchvision = types.ModuleType("torchvision")
torchvision.models = types.ModuleType("torchvision.models")
torchvision.models.resnet = resnet
sys.modules.update(
    {"torchvision": torchvision, "torchvision.models": torchvision.models, resnet.__name__: resnet}
)
from rigl_torch.RigL import RigLScheduler  # noqa: E402

NEVER = 10**9


def scheduler_of(model, optimizer, delta=NEVER, t_end=NEVER, **options):
    return RigLScheduler(
        model, optimizer, dense_allocation=1 - SPARSITY, T_end=t_end, delta=delta,
        alpha=DROP_FRACTION, ignore_linear_layers=False, **options,
    )  # fmt: skip


class RigLTorch(measuring.Peer):
    name = "rigl-torch"
    reasons: dict = {}

    def versions(self):
        return {"rigl-torch": metadata.version("rigl-torch"), "torch": torch.__version__}

    def steps(self, network):
        dense, masked = (networks.NETWORKS[network]() for _ in range(2))
        optimizer = networks.sgd(masked)
        try:
            scheduler = scheduler_of(masked, optimizer)
        except Exception as error:
            raise measuring.CannotRun(f"{type(error).__name__}: {error}") from error
        return {
            "dense": networks.step_of(dense, networks.sgd(dense), network),
            "sparse": networks.step_of(masked, optimizer, network, after=scheduler),
        }

    def update(self, shapes):
        model = networks.modules(shapes)
        optimizer = networks.sgd(model)
        scheduler = scheduler_of(model, optimizer)
        for weight, hook in zip(scheduler.W, scheduler.backward_hook_objects):
            weight.grad = torch.randn_like(weight)
            if hook is not None:  # the first layer stays dense
                hook.dense_grad = torch.randn_like(weight)
        return scheduler._rigl_step, "RigL: drop and grow, weights and momentum too"

    def counts(self):
        model = networks.resnet20()
        optimizer = networks.sgd(model)
        scheduler = scheduler_of(model, optimizer, delta=2, t_end=2 * UPDATES + 2)
        step = networks.step_of(model, optimizer, "resnet20", after=scheduler)
        masks = [mask for mask in scheduler.backward_masks if mask is not None]
        before = [int(mask.sum()) for mask in masks]
        for _ in range(2 * UPDATES):
            step()
        assert scheduler.rigl_steps == UPDATES
        return before, [int(m.sum()) for m in scheduler.backward_masks if m is not None]

    def memory(self):
        model = networks.resnet20()
        optimizer = networks.sgd(model)
        scheduler = scheduler_of(model, optimizer, delta=2)
        step = networks.step_of(model, optimizer, "resnet20", after=scheduler)
        step()
        hooks = [hook for hook in scheduler.backward_hook_objects if hook is not None]
        step()  # the step before an update keeps the gradient
        masks = [mask for mask in scheduler.backward_masks if mask is not None]
        kept = sum(h.dense_grad.nbytes for h in hooks if h.dense_grad is not None)
        return (sum(m.nbytes for m in masks) + kept) / sum(m.numel() for m in masks)

    def files(self, folder):
        dense, sparse = folder / "dense.pt", folder / "sparse.pt"
        model = networks.modules(measuring.ONE_KERNEL)
        torch.save(model.state_dict(), dense)
        scheduler_of(model, networks.sgd(model))
        torch.save(model.state_dict(), sparse)
        return dense, sparse, "a dense file with zeros; masks in a state dict of their own"

    def crash(self, folder):
        def make(model, optimizer):
            every = measuring.CRASH["update_every"]
            return scheduler_of(model, optimizer, delta=every, t_end=measuring.CRASH["steps"] + 1)

        def restore(trained, saved):
            trained.model.load_state_dict(saved[0])
            trained.optimizer.load_state_dict(saved[1])
            trained.state.load_state_dict(saved[2])

        whole, resumed = networks.crashed(
            make,
            lambda trained: trained.state(),
            lambda trained: [
                part.state_dict() for part in (trained.model, trained.optimizer, trained.state)
            ],
            restore,
        )
        remark = "three state dicts to save together; killed between two updates"
        return whole, resumed, remark

    def kinds(self):
        found = {}
        for name, module in networks.blocks().items():
            kernels = networks.kernels_of(module)
            try:
                module = nn.Sequential(nn.Linear(2, 2), module)  # the first one it leaves dense
                scheduler = scheduler_of(module, networks.sgd(module))
                masked = sum(m.numel() for m in scheduler.backward_masks[1:] if m is not None)
                found[name] = masked / sum(p.numel() for p in kernels.values())
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        return found

    def next_mask(self, method, weights, mask, gradient, num_update):
        if method == "SET":
            raise measuring.CannotRun("no SET")
        model = nn.Sequential(nn.Linear(*weights.shape[::-1], bias=False))
        optimizer = networks.sgd(model)
        scheduler = scheduler_of(model, optimizer)
        with torch.no_grad():
            scheduler.W[0].copy_(torch.tensor(weights))
        scheduler.backward_masks[0] = torch.tensor(mask)
        scheduler.W[0].grad = torch.zeros_like(scheduler.W[0])
        scheduler.backward_hook_objects[0].dense_grad = torch.tensor(gradient)
        scheduler._rigl_step()
        return scheduler.backward_masks[0].numpy()


if __name__ == "__main__":
    measuring.main(RigLTorch())
