"""What LeRobot imports to discover CogMerge: configurations, devices and processor steps, no modelling code.

LeRobot imports the package named like this distribution and swallows errors, so nothing optional may be
imported here unguarded. Processor steps must be imported because a checkpoint's JSON names them.
"""

from lerobot_policy_cogmerge.camera_cogmerge import CogMergeEmulatedCamera, CogMergeEmulatedCameraConfig
from lerobot_policy_cogmerge.env_cogmerge import CogMergeLiberoEnv
from lerobot_policy_cogmerge.robot_cogmerge import CogMergeSo101, CogMergeSo101Config
from vla.policy.configuration_cogmerge import CogMergeConfig
from vla.policy.processor_cogmerge import InstructionStep, ResizeImagesStep

__all__ = [
    "CogMergeConfig",
    "CogMergeEmulatedCamera",
    "CogMergeEmulatedCameraConfig",
    "CogMergeLiberoEnv",
    "CogMergeSo101",
    "CogMergeSo101Config",
    "InstructionStep",
    "ResizeImagesStep",
]
