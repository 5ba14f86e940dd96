"""The errors of this package: whether the input, the checkpoint, the clock or the memory is at fault is a class.

    Mu2ModelError
    ├── VolumeError               an array or an affine no trustworthy draft can be made from
    ├── QuestionError             an empty question, one that is too long or holds a placeholder, settings nobody knows
    ├── CheckpointError           a checkpoint that is not one of ours, or not as published
    ├── DeviceError               a device that this machine does not have (also a RuntimeError)
    ├── DeadlineExceededError     generation passed its deadline (also a TimeoutError)
    └── MemoryEstimateError       weights or a batch that would not fit the free memory (also a MemoryError)

An allocation that fails in spite of the estimate surfaces as `torch.OutOfMemoryError` on a GPU, a RuntimeError on the host.
Messages hold shapes, counts and tensor names, never voxels or text of a patient.
"""


class Mu2ModelError(Exception):
    """Base of every error this package raises on purpose."""


class VolumeError(Mu2ModelError, ValueError):
    """The array or its affine cannot be made into a model input."""


class QuestionError(Mu2ModelError, ValueError):
    """The question cannot be asked as it stands."""


class CheckpointError(Mu2ModelError, ValueError):
    """A tensor or a config key of the checkpoint is missing, unexpected or mis-shaped."""


class DeviceError(Mu2ModelError, RuntimeError):
    """The device that was named is not there."""


class DeadlineExceededError(Mu2ModelError, TimeoutError):
    """Generation was stopped because its deadline passed; nothing of the batch is returned."""


class MemoryEstimateError(Mu2ModelError, MemoryError):
    """The estimate says that the weights or the batch do not fit the free memory."""
