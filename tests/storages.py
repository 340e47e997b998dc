"""What memory a computation takes at most, in storages of more than a megabyte."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargeStorages(TorchDispatchMode):
    """Counts the storages of more than a megabyte that are made and exist together, and their bytes."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.most_bytes = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views and operations in place make none
        for storage in _storages(result):
            if storage.nbytes() > 1 << 20 and storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: own for key, own in self.alive.items() if not own[0].expired()}
        self.most = max(self.most, len(self.alive))
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self.alive.values()))
        return result


def _storages(tree):
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
    return [leaf.untyped_storage() for leaf in leaves]
