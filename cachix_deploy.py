#!/usr/bin/env python3
"""The agent of a machine, and the command line of the whole program."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable, Optional

import cachix_console
import cachix_other
import cachix_program
import cachix_source
from activate import (
    environment,
    files,
    history,
    holder,
    journal,
    lock,
    nix,
    outcomes,
    process,
    startup,
)
from activate.agent import conductor, linger, mark, netrc, single
from activate.agent.hooks import AgentHooks, Ended
from activate.text import brief
from activate.values import replace
from cachix_connection import (
    CALL_TIMEOUT,
    backoff,
    close,
    connect,
    connection_lost,
    hang_up,
    reach,
)
from cachix_console import complain, debug, exit_now, tell
from cachix_gate import Gate, remark
from cachix_inbox import Inbox
from cachix_options import AgentOptions, agent_options, create_key, parse
from cachix_postdeploy import PostDeploy
from cachix_protocol import (
    PLAIN,
    AgentRegistered,
    AlreadyRunning,
    Deployment,
    Error,
    Refused,
    Undecodable,
    Unreachable,
    UsageError,
    Wish,
    __version__,
    decode_to_agent,
)
from cachix_repeats import Repeats
from cachix_report_state import StateReporter
from cachix_reported import Reported
from cachix_reports import Reporter
from cachix_secret import OwnToken
from cachix_textfile import Textfile

if TYPE_CHECKING:
    import websocket

STOP_TIMEOUT = 8.0  # seconds from SIGTERM to the exit, whatever hangs
PRECEDENCE = 0.3  # seconds for which an agent that registers has the processor for itself
BY_HAND_PAUSE = 0.2  # seconds between two looks whether somebody deploys by hand
EXIT_TIMEOUT = 6.0  # seconds for a deployment to stop before "go"; `still_wanted` takes up to 5


# --- worker ---------------------------------------------------------------------------------------


class Worker(threading.Thread):
    """The thread that leads deployments to their ends, one at a time."""

    def __init__(
        self, options: AgentOptions, state: str, reporter: Reporter, stop: threading.Event
    ) -> None:
        super().__init__(name="worker", daemon=True)
        self.options, self.state, self.reporter, self.stop = options, state, reporter, stop
        self.inbox = Inbox()
        self.registered: Optional[AgentRegistered] = None
        self.greeted = threading.Event()
        self.nix_config: dict[str, str] = {}
        self.deployed = threading.Event()
        self.accepted: set[str] = set()  # ids of those that wait or are in progress
        peer, policy = options.peer, options.policy.changes()
        config = {"host": peer.host, "token": peer.token, "name": peer.name, "policy": policy}
        self.hooks = AgentHooks(
            config=config,
            switch_command=cachix_program.command("cachix_switch"),
            switch_files=cachix_program.files(),
            scope_timeout=options.waits.ready,
            download_timeout=options.waits.download,
            stop=stop,
            source=self.source,
            is_cancelled=reporter.is_cancelled,
            still_wanted=self.still_wanted,
            changed=self.note_change,
            measured=reporter.measured,
            tell=tell,
            reach=lambda timeout: reach(peer, timeout),
            is_replaced=self.is_replaced,
        )
        self.conductor = conductor.Conductor(self.hooks)
        self.gate = Gate(state, options.deployment_keys, options.unsigned_rollback, tell)
        profile, waits = options.profile, options.waits
        self.post_deploy = PostDeploy(options.post_deploy, state, peer.name or "", tell)
        self.post_deploy.stop, self.post_deploy.timeout = stop, waits.post_deploy
        self.textfile: Optional[Textfile] = None
        if options.metrics_file is not None:
            place = (options.metrics_file, state, options.name)
            self.textfile = Textfile(*place, profile, Repeats(tell))
        self.machine = StateReporter(peer, waits, state, profile, reporter.idle)

    def note_change(self) -> None:
        """Let reports and metrics follow a deployment."""
        self.reporter.wake.set()
        if self.textfile is not None:
            self.textfile.wake.set()

    def run(self) -> None:
        self.greeted.wait(PRECEDENCE)
        self.nix_config = nix.show_config()
        if self.textfile is not None:
            self.textfile.start()
        self.guarded(self.post_deploy.begin)
        self.guarded(self.recover)
        self.guarded(self.post_deploy.run_due)
        self.machine.start()
        while not self.stop.is_set():
            deployments = self.inbox.take_all(self.options.waits.look)
            if not deployments:
                self.guarded(self.finish_local)
                self.guarded(self.post_deploy.run_due)
                continue
            *older, newest = deployments
            for deployment in older:
                self.guarded(self.supersede, deployment, newest)
            self.guarded(self.deploy, newest)
            self.accepted -= {deployment.id for deployment in deployments}
            self.machine.wake.set()
            self.note_change()
            self.guarded(self.post_deploy.run_due)

    def put(self, deployment: Deployment) -> None:
        """Accept a deployment. The same one is accepted again after its end only.

        That repeats its report, which the workspace may have missed.
        """
        if deployment.id in self.accepted and not conductor.has_ended(self.state, deployment.id):
            return
        self.accepted.add(deployment.id)
        self.inbox.put(deployment)

    def guarded(self, do: Callable[..., None], *arguments: Any) -> None:
        """Call `do`, and print any error: whatever goes wrong, the next deployment is taken."""
        try:
            do(*arguments)
        except Exception as error:
            complain(error)

    def begin(self, deployment: Deployment) -> Optional[journal.Journal]:
        """Start to report a new deployment, and return its journal.

        None if the deployment has a journal already; if it has ended it is reported again.
        """
        directory = os.path.join(self.state, "deployments", deployment.id)
        earlier = None
        with contextlib.suppress(journal.Unreadable):
            earlier = journal.load(directory)
        if earlier is not None:
            if earlier.record.step in journal.FINAL:
                with contextlib.suppress(OSError):
                    os.unlink(earlier.path("reported.json"))
                self.reporter.add(earlier)
            return None
        record = journal.Record(
            id=deployment.id,
            index=deployment.index,
            agent=self.options.name,
            host=self.options.peer.host,
            store_path=deployment.store_path,
            rollback_script=deployment.rollback_script,
            profile_name=self.options.profile,
            sequence=history.next_sequence(history.load_all(self.state)[0]),
            signature=deployment.signature,
            **vars(Wish.known(deployment.wish) or PLAIN),
        )
        entry = journal.Journal(directory, record)
        self.reporter.add(entry)
        return entry

    def supersede(self, older: Deployment, newer: Deployment) -> None:
        """End a deployment without executing it, because a newer one is waiting."""
        entry = self.begin(older)
        if entry is not None:
            reason = f"deployment {newer.index} arrived before this one was started"
            self.conductor.end(entry, Ended(journal.SUPERSEDED, reason))

    def deploy(self, deployment: Deployment) -> None:
        """Lead a deployment to its end."""
        if deployment.resumed:
            name, profile = self.options.name, self.options.profile
            conductor.wait_for_leader(self.hooks, deployment.id, name, profile)
        entry = self.begin(deployment)
        if entry is None:
            return
        if deployment.resumed or history.was_set_aside(entry.directory):
            reason = "state lost: without its journal nothing is executed"
            end = Ended(journal.FAILED, reason, outcome=outcomes.STATE_LOST)
            self.conductor.end(entry, end)
            return
        if Wish.known(deployment.wish) is None:
            reason = "this agent does not know what its `options` ask for; nothing was changed"
            self.conductor.end(entry, Ended(journal.FAILED, reason))
            return
        tell(f"deployment {deployment.index}: {brief(deployment.store_path)}")
        before, _ = history.load_all(self.state)
        self.let_go_first()
        if problem := self.gate.problem(entry.record, before):
            self.conductor.end(entry, Ended(journal.FAILED, problem))
            return
        if words := remark(entry.record, before):
            tell(words)
        self.conductor.settle(entry)
        self.deployed.set()

    def let_go_first(self) -> None:
        """Wait as long as somebody at the machine deploys: he has cancelled what had the turn."""
        path, give_up = holder.by_hand_path(self.state), time.monotonic() + lock.DEPLOYMENT_TIMEOUT
        while lock.held(path) and time.monotonic() < give_up and not self.stop.wait(BY_HAND_PAUSE):
            pass

    def is_replaced(self, entry: journal.Journal) -> bool:
        """Whether a newer deployment of this agent waits."""
        record = entry.record
        ours = (record.agent, record.host) == (self.options.name, self.options.peer.host)
        return ours and self.inbox.has_newer(record.index)

    def recover(self) -> None:
        """Finish and report what an earlier agent left behind.

        A deployment that has changed the machine is finished even if an agent of another name, or
        of another workspace, started it.
        """
        netrc.remove_stale(self.state)
        journals, problems = history.load_all(self.state)
        for problem in problems:
            tell(problem)
        # those that need no download first: the workspace has yet to tell us its cache
        for entry in sorted(journals, key=lambda entry: entry.record.step in journal.HARMLESS):
            self.recover_one(entry)
        self.finish_local()

    def recover_one(self, entry: journal.Journal) -> None:
        """Finish and report one deployment, unless another agent does that."""
        record = entry.record
        ours = (record.agent, record.host) == (self.options.name, self.options.peer.host)
        ended = record.step in journal.FINAL
        if ours and not (ended and Reported.load(entry.path("reported.json")).whole):
            self.reporter.add(entry)
            self.guarded(self.conductor.settle, entry)
            if not ended:
                self.deployed.set()
        elif ended:
            if record.step != journal.ROLLBACK_FAILED:
                entry.drop_roots()
        elif record.step not in journal.HARMLESS and holder.is_free(entry):
            self.guarded(self.conductor.settle, entry)

    def finish_local(self) -> None:
        """Finish what was begun by hand and is led by nobody any more."""
        for entry in history.load_all(self.state)[0]:
            if entry.record.by_hand and entry.record.step in journal.FINAL:
                entry.drop_roots()
            elif entry.record.by_hand and holder.is_free(entry):
                self.conductor.settle(entry)

    @contextlib.contextmanager
    def source(self) -> Iterator[nix.Source]:
        """The workspace's cache for Nix, with a netrc that exists only while it is needed."""
        while self.registered is None:  # we may be finishing an earlier agent's deployment
            if self.stop.wait(0.1):
                raise Error("the agent is exiting")
        pinned, config = self.options.trusted_keys, self.nix_config
        cache, peer = self.registered.cache, self.options.peer
        with cachix_source.source(cache, peer, pinned, config, self.state) as source:
            yield source

    def still_wanted(self, entry: journal.Journal) -> None:
        """Check that the deployment is still to be activated, right before anything changes.

        Raises Ended if it was superseded, Error if the agent is exiting.
        """
        if self.inbox.has_newer(entry.record.index):
            reason = "a newer deployment arrived before this one was activated"
            raise Ended(journal.SUPERSEDED, reason)
        if self.stop.is_set():
            raise Error("the agent is exiting")
        self.gate.pass_through(entry.record, history.load_all(self.state)[0])


# --- agent ----------------------------------------------------------------------------------------


class Stopped(Exception):
    """The agent exits, because the workspace asks it to or another one has taken over."""


class Renewed(Exception):
    """The agent has got a token of its own, and comes again with that."""


class Agent:
    """The main thread, which keeps the agent connected to its workspace."""

    def __init__(self, options: AgentOptions, state: str) -> None:
        self.options, self.state, self.waits = options, state, options.waits
        self.stop = threading.Event()
        self.reporter = Reporter(options.peer, options.waits)
        self.token = OwnToken(state, options.peer, not options.bootstrap, tell)
        self.worker = Worker(options, state, self.reporter, self.stop)
        self.socket: Optional[websocket.WebSocket] = None
        self.pending: list[Deployment] = []
        self.replaced = False
        self.mark = mark.Mark(state, options.name, options.peer.host, __version__)
        self.repeats = Repeats(tell)
        self.exit_by = float("inf")

    def run(self) -> int:
        """Stay connected until asked to stop; the exit status. Raises Refused at the start only."""
        self.reporter.start()
        self.worker.start()
        failures, first = 0, True
        while not self.stop.is_set():
            start, slowest = time.monotonic(), False
            try:
                self.socket = connect(self.options.peer, "/ws", self.waits.connect)
                first = False
                self.serve(self.socket)
            except Stopped:
                break
            except Renewed:
                self.pause(0)
                continue
            except Refused as error:
                if self.token.try_other(error):
                    continue
                if first:
                    raise
                slowest = True
                self.repeats.tell(f"{error}; still trying")
            except Error as error:
                if not self.stop.is_set():
                    self.repeats.tell(str(error))
            if self.stop.is_set():
                break
            failures += 1
            if time.monotonic() - start > self.waits.healthy:
                failures = 0
                self.repeats.forget()
            if slowest or self.replaced:
                self.pause(self.waits.slowest)
            else:
                self.pause(backoff(failures - 1, self.waits))
        self.prepare_exit()
        if self.socket is not None:
            close(self.socket)
        return 0

    def pause(self, seconds: float) -> None:
        """Drop the connection, and wait before the next one."""
        with contextlib.suppress(OSError):
            self.mark.lose()
        self.worker.note_change()
        if self.socket is not None:
            hang_up(self.socket)
        debug(f"connecting again in {seconds:.1f} s")
        self.stop.wait(seconds)

    def prepare_exit(self) -> None:
        """Stop downloads, and tell a running switch process, which goes on, that we are leaving."""
        self.stop.set()
        process.end_all()
        leader = self.worker.conductor
        switch = leader.switch
        deadline = self.exit_by = min(self.exit_by, time.monotonic() + EXIT_TIMEOUT)
        if switch is None:
            return
        while not switch.step and leader.attempt is not None and time.monotonic() < deadline:
            time.sleep(0.02)  # the worker has yet to note that this attempt does not count
            process.end_all()
        if switch.step not in (journal.ACTIVATING, journal.CHECKING):
            switch.pipe.say_goodbye()
        else:
            switch.pipe.say_leaving()

    def request_stop(self) -> None:
        """End the agent from another thread than the main one."""
        self.prepare_exit()
        if self.socket is not None:
            with contextlib.suppress(Exception):
                self.socket.settimeout(1)
                self.socket.send_close()
            hang_up(self.socket)

    def serve(self, sock: websocket.WebSocket) -> None:
        """Receive until the connection ends. Raises Stopped, or Unreachable with the reason."""
        import websocket

        last_frame = last_ping = time.monotonic()
        self.send_ping(sock)
        while not self.stop.is_set():  # the stop may have come before we had connected
            quiet = max(last_ping, last_frame) if self.is_pinged else last_ping
            due = min(quiet + self.waits.ping, last_frame + self.waits.silence)
            sock.settimeout(max(0.01, due - time.monotonic()))
            try:
                opcode, frame = sock.recv_data_frame(control_frame=True)
                last_frame = time.monotonic()
            except websocket.WebSocketTimeoutException:
                if time.monotonic() >= last_frame + self.waits.silence:
                    silence = f"no answer for {self.waits.silence:.0f} s"
                    raise Unreachable(f"{silence}, connecting again") from None
                if time.monotonic() >= quiet + self.waits.ping:
                    self.send_ping(sock)
                    last_ping = time.monotonic()
                continue
            except (OSError, websocket.WebSocketException) as error:
                raise connection_lost(error) from None
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                self.handle_close(frame.data)
            elif opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                self.receive(frame.data)

    @property
    def is_pinged(self) -> bool:
        """Whether the workspace pings us: then we ping only if it does not, and wake up less."""
        return getattr(self.worker.registered, "reports", None) == "http"

    def send_ping(self, sock: websocket.WebSocket) -> None:
        """Send a ping. Raises Unreachable if it can't be sent in time."""
        import websocket

        try:
            sock.settimeout(CALL_TIMEOUT)
            sock.ping()
        except (OSError, websocket.WebSocketException) as error:
            raise connection_lost(error) from None

    def handle_close(self, data: bytes) -> None:
        """Raise what a close frame means: only 1000, or no code, asks the agent to exit."""
        if self.stop.is_set():  # the answer to our own close
            raise Stopped
        code = int.from_bytes(data[:2], "big") if len(data) >= 2 else 1000
        reason = brief(data[2:].decode("utf-8", "replace"))
        if code == 1000:
            self.finish()
            raise Stopped
        self.replaced = code == 4001
        if self.replaced and self.options.bootstrap:
            tell("another agent of this name has taken over")
            self.drain()
            raise Stopped
        meanings = {
            1012: "it restarts",
            4001: f"another agent named {self.options.name} has connected",
            4003: "the token was revoked",
        }
        reason = reason or meanings.get(code, "no reason given")
        raise Unreachable(f"the workspace closed the connection ({code}): {reason}")

    def receive(self, data: bytes) -> None:
        """Act on a message. One that can't be decoded is reported and skipped."""
        try:
            message = decode_to_agent(data)
        except (Undecodable, UnicodeDecodeError) as error:
            tell(f"skipped a message from the workspace: {error}")
            return
        if isinstance(message, AgentRegistered):
            if self.token.keep(message.secret):
                raise Renewed
            self.register(message)
        else:
            self.pending.append(message)
        if self.worker.registered is not None:
            for deployment in self.pending:
                self.worker.put(deployment)
            self.pending.clear()

    def register(self, message: AgentRegistered) -> None:
        """Take note of our registration, also in a file that switch processes watch."""
        tell(f"{self.options.name} is connected to {self.options.peer.host}")
        self.replaced = False
        self.worker.hooks.config["token"] = self.options.peer.token
        if message.expires:
            tell(f"warning: this agent's token expires on {message.expires[:10]}")
        self.worker.registered = replace(message, secret=None)
        self.worker.greeted.set()
        self.reporter.register(message)
        self.worker.machine.register(message)
        known = AgentRegistered(message.id, None, message.reports).to_json()
        self.worker.hooks.config["registered"] = known
        try:
            self.mark.set(known, None if message.cache is None else message.cache.to_json())
        except OSError as error:
            complain(Error(f"{self.state} can't be written: {error}"))
        self.worker.note_change()

    def finish(self) -> None:
        """Finish and report the deployments that were accepted: the workspace asks us to exit."""
        if self.socket is not None:
            hang_up(self.socket)
        worker, message = self.worker, "the workspace asked this agent to stop"
        is_busy = worker.accepted or worker.conductor.attempt is not None
        tell(f"{message}, after the deployment in progress" if is_busy else message)
        if worker.registered is None:  # a download would wait for the registration
            return
        while not (worker.inbox.is_idle or worker.conductor.is_waiting or self.stop.wait(0.1)):
            pass
        self.drain()

    def drain(self) -> None:
        """Let the deployment in progress end and its report arrive; take no new ones.

        A report that does not arrive in time is left to the successor.
        """
        while self.worker.conductor.attempt is not None and not self.stop.wait(0.2):
            pass
        deadline = time.monotonic() + self.waits.handover
        while not self.reporter.idle.is_set() and time.monotonic() < deadline:
            if self.stop.wait(0.2):
                return


def watch_signals(agent: Agent) -> None:
    """Let SIGTERM and SIGINT end the agent, even while a name look-up holds its main thread."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def run(keep_open: socket.socket = writer) -> None:
        while not {signal.SIGTERM, signal.SIGINT} & set(reader.recv(64)):
            pass
        tell("asked to stop")
        deadline = time.monotonic() + STOP_TIMEOUT
        agent.request_stop()
        time.sleep(max(0.0, deadline - time.monotonic()))
        exit_now(0)  # the main thread hangs: in a name look-up, or because nobody reads our close

    threading.Thread(target=run, name="signals", daemon=True).start()


def agent_command(options: AgentOptions) -> int:
    """Run an agent until it is asked to stop; the exit status. Raises Error."""
    startup.protect()
    foreign = environment.leave_others()
    try:
        home = environment.home()
    except environment.NoHome as error:
        raise UsageError(str(error)) from None
    if foreign:
        tell(f"{', '.join(foreign)}: not root's own, so the home directory is {home} instead")
    state = journal.state_directory()
    for directory in (state, os.path.join(state, "deployments")):
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            if problem := files.make_private(directory):
                tell(problem)
        except OSError as error:  # each deployment will fail with this reason: better than no agent
            hint = "set STATE_DIRECTORY to a directory that can be written"
            complain(Error(f"{directory} can't be created ({error.strerror}): {hint}"))
    if problem := lock.foreign(lock.shared_path("agent", options.name)):
        tell(f"{problem}: going on without the locks there, which Cachix's own agent would take")
    if warning := linger.problem():
        tell(warning)
    agent = Agent(options, state)
    if options.bootstrap:
        watch_signals(agent)
        threading.Thread(target=hand_over, args=(agent,), name="hand-over", daemon=True).start()
        return agent.run()
    watch_signals(agent)
    if not be_single(options, state, agent.stop):
        return 0
    return agent.run()


def be_single(options: AgentOptions, state: str, stop: threading.Event) -> bool:
    """Be the only agent of the name for as long as this process lives. Raises Error.

    False if another one runs and --if-stopped is set, or if `stop` is set while we wait.
    """
    name = options.name
    if options.if_stopped:
        is_only_one = single.take(state, name)
        if not is_only_one:
            debug(f"an agent named {name} is running already")
        return is_only_one
    patience = single.Patience(options.waits.former, options.policy.activation_timeout)
    try:
        return single.wait(state, name, patience, tell, lambda: stop.wait(0.1))
    except single.Busy as error:
        raise AlreadyRunning(f"{error}; choose another NAME, or stop it first") from None


def hand_over(agent: Agent) -> None:
    """End a bootstrapping agent once the machine's own agent has taken over (a thread)."""
    worker, name, timeout = agent.worker, agent.options.name, agent.waits.handover
    while not agent.stop.is_set():
        worker.deployed.wait()
        worker.deployed.clear()
        tell(f"waiting up to {timeout:.0f} s for the machine's own agent named {name} to take over")
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not agent.stop.is_set():
            successor = single.owner(agent.state, name)
            if successor is not None and not successor.is_gone:
                tell(f"the agent with pid {successor.pid or '?'} has taken over")
                agent.drain()
                agent.request_stop()
                return
            time.sleep(0.2)
        tell(f"no agent named {name} has started, so this one stays")


# --- main -----------------------------------------------------------------------------------------


def activate_command(options: dict[str, Any]) -> int:
    """Deploy and wait; the exit status. Raises Error."""
    import cachix_ci
    import cachix_spec

    startup.protect(writes=False)
    return cachix_ci.activate_command(cachix_spec.activate_options(options))


def main(argv: Optional[list[str]] = None) -> int:
    """Run a command line and return its exit status."""
    cachix_console.prepare()
    status = run(sys.argv[1:] if argv is None else argv)
    if sys.flags.inspect:  # by PYTHONINSPECT: Python would print a traceback of our exit
        exit_now(status)
    return status


def run(argv: list[str]) -> int:
    """Run a command line; the exit status."""
    try:
        cachix_other.hand_over(sys.argv[0], argv)
        options = parse(argv)
        cachix_console.verbose = options["--verbose"]
        if options["agent"]:
            signal.signal(signal.SIGTERM, lambda *_: exit_now(0))  # nothing has begun yet
            return agent_command(agent_options(options))
        if options["push"]:
            import cachix_push

            return cachix_push.push_command(options)
        if options["status"]:
            import cachix_status

            return cachix_status.status_command(options["--json"])
        if options["check"] or options["doctor"]:
            import cachix_check

            return cachix_check.check_command(options)
        if options["rollback"] or options["activate-local"]:
            import cachix_local

            is_rollback = options["rollback"]
            does = cachix_local.rollback_command if is_rollback else cachix_local.activate_command
            return does(options)
        return create_key(options) if options["key"] else activate_command(options)
    except Error as error:
        complain(error)
        return error.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
