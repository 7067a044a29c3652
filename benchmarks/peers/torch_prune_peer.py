"""`torch.nn.utils.prune`: masks by magnitude, no training method around them."""

import measuring
import numpy as np
import torch
import torch_networks as networks
from measuring import DROP_FRACTION, SPARSITY
from torch.nn.utils import prune


def prunable(model):
    return [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]


def sparse(model, optimizer=None):
    for module in prunable(model):
        prune.l1_unstructured(module, "weight", SPARSITY)
    return model


class TorchPrune(measuring.Peer):
    name = "torch.nn.utils.prune"
    reasons = {
        "semantics": "nothing grows: it prunes by magnitude, once or again and again",
    }

    def versions(self):
        return {"torch": torch.__version__, "numpy": np.__version__}

    def steps(self, network):
        dense, masked = (networks.NETWORKS[network]() for _ in range(2))
        sparse(masked)
        return {
            name: networks.step_of(model, networks.sgd(model), network)
            for name, model in (("dense", dense), ("sparse", masked))
        }

    def update(self, shapes):
        model = networks.modules(shapes)

        def update():
            for module in prunable(model):
                prune.l1_unstructured(module, "weight", DROP_FRACTION)
                prune.remove(module, "weight")

        return update, "drops the smallest 30 % of each kernel; nothing grows"

    def counts(self):
        model = sparse(networks.resnet20())
        masks = [module.weight_mask for module in prunable(model)]
        before = [int(mask.sum()) for mask in masks]
        step = networks.step_of(model, networks.sgd(model), "resnet20")
        for _ in range(3):  # without updates: what is pruned stays so
            step()
        return before, [int((module.weight != 0).sum()) for module in prunable(model)]

    def memory(self):
        model = sparse(networks.resnet20())
        size = sum(m.weight.numel() for m in prunable(model))
        extra = sum(m.weight_mask.nbytes + m.weight.nbytes for m in prunable(model))
        return extra / size

    def files(self, folder):
        dense, sparse_ = folder / "dense.pt", folder / "sparse.pt"
        model = networks.modules(measuring.ONE_KERNEL)
        torch.save(model.state_dict(), dense)
        sparse(model)
        for module in prunable(model):
            prune.remove(module, "weight")
        torch.save(model.state_dict(), sparse_)
        return dense, sparse_, "after `prune.remove`: a dense file with zeros"

    def crash(self, folder):
        def restore(trained, saved):
            trained.model.load_state_dict(saved[0])
            trained.optimizer.load_state_dict(saved[1])

        whole, resumed = networks.crashed(
            lambda model, optimizer: sparse(model) and None,
            lambda trained: None,
            lambda trained: (trained.model.state_dict(), trained.optimizer.state_dict()),
            restore,
        )
        return whole, resumed, "masks are in the state dict; static masks only"

    def kinds(self):
        found = {}
        for name, module in networks.blocks().items():
            kernels = networks.kernels_of(module)
            try:
                for path in kernels:
                    owner, _, parameter = path.rpartition(".")
                    prune.l1_unstructured(module.get_submodule(owner), parameter, SPARSITY)
                masks = [b for n, b in module.named_buffers() if n.endswith("_mask")]
                found[name] = sum(b.numel() for b in masks) / sum(
                    p.numel() for p in kernels.values()
                )
                if not networks.reaches_output(name, module, masks):
                    found[name] = "masks that do not reach the output"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:160]
        return found


if __name__ == "__main__":
    measuring.main(TorchPrune())
