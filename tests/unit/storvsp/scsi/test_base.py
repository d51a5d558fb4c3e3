"""Commands of all units: operation codes, logs, diagnostics."""

from tests.support.scsi import Reply, hexes, make_unit, run


async def test_the_log_lists_itself():
    _, unit = make_unit()
    for cdb in ("4d 00 40 00 00 0000 00ff 00", "4d 00 00 00 00 0000 00ff 00"):
        assert (await run(unit, cdb, room=255)).data == bytes((0, 0, 0, 1, 0))
    for cdb, pointer in (
        ("4d 01", (1, 0, True)),
        ("4d 00 42", (2, 5, True)),
        ("4d 00 40 01", (3, None, True)),
    ):
        full = bytes.fromhex(cdb).ljust(10, b"\0")
        assert (await run(unit, full, room=255)).pointer == pointer


async def test_the_self_test_passes_and_nothing_else_is_diagnosed():
    _, unit = make_unit()
    assert (await run(unit, "1d 04 00 0000 00")).status == 0
    assert (await run(unit, "1d 20 00 0000 00")).pointer == (1, 7, True)
    assert (await run(unit, "1d 10 00 0008 00", out=bytes(8))).pointer == (3, None, True)


def codes(data: bytes) -> set[tuple[int, int | None]]:
    return {
        (data[at], int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 5] & 1 else None)
        for at in range(4, len(data), 8)
    }


async def test_supported_operation_codes_are_those_that_work():
    for thin in (False, True):
        _, unit = make_unit(supports_unmap=thin)
        reply = await run(unit, "a3 0c 00 00 0000 00002000 00 00", room=8192)
        assert int.from_bytes(reply.data[:4], "big") == len(reply.data) - 4
        supported = codes(reply.data)
        assert ((0x42, None) in supported) == thin
        assert {(0x9E, 0x10), (0xA3, 0x0C), (0x28, None), (0x5F, 6)} <= supported
        plain = {code for code, action in supported if action is None}
        for opcode in range(256):
            if opcode in {code for code, action in supported if action is not None}:
                continue
            reply = await run(unit, bytes([opcode]) + bytes(15), room=64)
            refused = reply.status == 2 and reply.fault == (5, 0x2000)
            assert refused == (opcode not in plain), hex(opcode)
        reply = await run(unit, "ff" + "00" * 15)
        assert reply.pointer == (0, None, True)


async def test_unknown_service_actions_are_refused_by_name():
    _, unit = make_unit()
    for opcode, known in (
        (0x9E, {0x10, 0x12}),
        (0xA3, {0x0C, 0x0D}),
        (0x5E, range(4)),
        (0x5F, range(7)),
    ):
        for action in set(range(32)) - set(known):
            reply = await run(unit, bytes((opcode, action)) + bytes(14))
            assert (reply.fault, reply.pointer) == ((5, 0x2400), (1, 4, True))
    assert (await run(unit, "9e")).pointer == (1, None, True)


async def test_one_operation_code_is_described_with_its_bits():
    _, unit = make_unit()

    async def ask(options: int, opcode: int, action: int = 0) -> Reply:
        cdb = bytes((0xA3, 0x0C, options, opcode, 0, action, 0, 0, 1, 0, 0, 0))
        return await run(unit, cdb, room=256)

    read = hexes("28f9ffffffff00ffff04")
    assert (await ask(1, 0x28)).data == hexes("0003000a") + read
    assert (await ask(3, 0x28)).data == hexes("0003000a") + read
    timeouts = hexes("000a 00 00 00000000 00000000")
    assert (await ask(0x81, 0x28)).data == hexes("0083000a") + read + timeouts
    long = hexes("9e1fffffffffffffffffffffffff0104")
    assert (await ask(2, 0x9E, 0x10)).data == hexes("00030010") + long
    assert (await ask(3, 0x9E, 0x10)).data == hexes("00030010") + long
    for options, opcode, action in (
        (1, 0xFF, 0),
        (2, 0xFF, 0),
        (3, 0x28, 1),
        (2, 0x9E, 0),
        (3, 0x9E, 0x1F),
    ):
        assert (await ask(options, opcode, action)).data == hexes("00010000")
    for options, opcode in ((1, 0x9E), (2, 0x28), (4, 0), (7, 0)):
        assert (await ask(options, opcode)).pointer == (2, 2, True)
    reply = await run(unit, "a3 0c 80 00 0000 00002000 00 00", room=8192)
    assert (len(reply.data) - 4) % 20 == 0
    assert reply.data[4:24] == hexes("00 00 0000 00 02 0006") + timeouts


async def test_task_management_functions_are_reported():
    _, unit = make_unit()
    assert (await run(unit, "a3 0d 00 00 0000 00000004 00 00", room=64)).data == hexes("08000000")
    reply = await run(unit, "a3 0d 80 00 0000 00000010 00 00", room=64)
    assert reply.data == hexes("0800000c") + bytes(12)
