"""The network: MobileNetV2 as a MindSpore cell, on standard operators or on ours."""
