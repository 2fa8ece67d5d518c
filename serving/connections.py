"""Connections over which nothing comes, or too slowly: uvicorn's protocol with a clock, which it has none of itself.

The clock runs while nobody in the app waits for what the client sends: for the head of a request, and for the rest of a
body whose request has its answer already. What the app waits for, it limits itself (`intake.py`).
"""

import asyncio
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def timed_protocol(read_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol of a server for `uvicorn.Config(http=...)`. read_timeout_s: for the head of a request."""

    class TimedProtocol(H11Protocol):
        _clock: asyncio.TimerHandle | None = None
        _begun = False  # a head has, and is not whole

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(cast(asyncio.Transport, transport))
            self._clock = self.loop.call_later(read_timeout_s, self._too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_clock()
            elif self._clock is None:
                self._clock = self.loop.call_later(read_timeout_s, self._too_slow)
            self._begun = self._clock is not None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def _stop_clock(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

        def _too_slow(self) -> None:
            if self.transport.is_closing():
                return
            if self._begun and self.conn.our_state is h11.IDLE:
                said = b"The head of the request did not come in time."
                headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
                head = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
                for event in (head, h11.Data(data=said), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return TimedProtocol
