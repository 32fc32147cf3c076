"""What Python sees of _speedups/grpc_web_step.pyx."""

from gateway._speedups.exchange import Step

class GrpcWebStep(Step):
    def __init__(self, name: str, body_limit: int) -> None: ...
