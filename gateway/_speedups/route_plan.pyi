METHOD_IDS: dict[bytes, int]

class Plan:
    def __init__(self, routes: list[object], specs: list[object], seed: int) -> None: ...
