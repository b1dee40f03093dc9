# SPDX-License-Identifier: Apache-2.0
# Ends commands of the SSH connection by which it comes. ending.py sends it and reads what it says:
#
#     /bin/sh -s WORD POLICY GRACE COUNT NUMBER...
#
# WORD      stands before all that it says, since a login shell may print as well
# POLICY    kill (TERM, GRACE, KILL), term (TERM, and nothing after GRACE) or look (only say whether anything is left
#           of commands that have ended)
# GRACE     in hundredths of a second
# COUNT     how many commands the connection runs here, those left out that were asked for after this script
# NUMBER... which of them are to end, in the order of their exec requests, from 1 on
#
# No command has a mark. All are children of the process that is the connection, as this script is (or the login shell
# that runs it as a child: find_connection). With OpenSSH they lead a session of their own, and what a command starts is
# in its session, unless it leaves that on purpose. What sudo and its like run in sessions of their own, and wait for,
# is a part of the command all the same (look_inside). With other servers (dropbear) all commands without a terminal
# share the session and the group of the connection's process: there a command is the process that the server started,
# with what descends from it (find_family).
#
# It says: `recount N` (it finds N commands), `unsure` (it cannot tell them apart), else `ending` and, of each number,
# `told NUMBER N` (N processes were told to end), then as often as that changes `proc NUMBER PID STATE WCHAN NAME` of
# what is left, closed by `left NUMBER N`; at last `gone NUMBER`, `alive NUMBER` or `hidden NUMBER` (what is left cannot
# be seen, or not told from what other commands have left). To `look`: `clean` or `unclean`.
#
# One function, called by the last line: a script that was cut off in the middle does nothing.

ctask_end() {
    exec 2>/dev/null
    # The connection may go once `ending` was said: what was begun is carried out.
    trap '' HUP INT PIPE TERM
    set -f
    WORD=$1 POLICY=$2 GRACE=$3 COUNT=$4
    shift 4
    NUMBERS=$*
    ME=$$ UP=$PPID SPACE=' ' LINE_END='
'
    PATH=${PATH:-}:/bin:/usr/bin
    # Names are bytes; and nothing from the account's environment changes what the tools do.
    LC_ALL=C IFS=$SPACE
    export LC_ALL
    unset GREP_OPTIONS POSIXLY_CORRECT
    unset -f grep sed sort sleep date ps tr ls cat

    find_connection
    [ "$POLICY" != look ] || look
    find_targets
    say ending
    now
    PHASE=term END=$((NOW + GRACE)) STEP=2 TOLD=' ' SAID=- BUDGET=400 INNER=' ' RELAYED=' ' HIDDEN='' HIDDEN_LOOKS=0 STRAYS=''
    survey
    term_groups
    while :; do
        pause
        survey && settle
        [ "$OPEN" ] || exit 0
        now
        if [ "$NOW" -lt "$END" ]; then
            [ $PHASE = kill ] && kill_all || term_new
        elif [ $PHASE = term ] && [ "$POLICY" = kill ]; then
            # What KILL does not end within a second waits for a device, or a file server.
            PHASE=kill END=$((NOW + 100)) STEP=2
            kill_all
        else
            for TARGET in $OPEN; do
                case "$HIDDEN " in *" $TARGET "*) LAST=hidden ;; *) LAST=alive ;; esac
                say $LAST "${TARGET%%:*}"
            done
            exit 0
        fi
    done
}

say() { printf '%s\n' "$WORD $*"; }

# NOW, in hundredths of a second.
now() {
    if read -r NOW REST </proc/uptime; then
        NOW=${NOW%.*}${NOW#*.}
    else
        NOW=$(date +%s)00
    fi
}

pause() {
    now
    [ $((END - NOW)) -ge $STEP ] || STEP=$((END - NOW))
    [ $STEP -ge 1 ] || STEP=1
    [ $STEP -lt 10 ] && FRACTION=0$STEP || FRACTION=$STEP
    # Not every sleep knows fractions.
    sleep "0.$FRACTION" || sleep 1
    STEP=$((STEP * 3 / 2 + 1))
    [ $STEP -le 25 ] || STEP=25
}

# The processes for which the filter of sed holds: PID PARENT GROUP SESSION STATE THREADS START NAME.
# A name may look like fields, and have an end of line in it. So the number is that of the file, what counts stands
# after the last parenthesis (no name is long enough to bring all of that), and the filter sees the fields put in order.
# The second argument is what the kernel's lines have of it: with sed on all of them, an ending costs twice as much.
# The third: of this process only.
table() {
    if [ -r "/proc/$ME/stat" ]; then
        set +f
        grep -E "[)] [A-Za-z] $2 " /proc/${3:-[0-9]*}/stat /dev/null | sed -n -E "s|^(/proc/[0-9]+/stat:)[0-9]+ [(]|\1|
s|^/proc/([0-9]+)/stat:(.*)[)] ([A-Za-z]) ([0-9]+) (-?[0-9]+) (-?[0-9]+) \
(-?[0-9]+ ){13}([0-9]+) -?[0-9]+ ([0-9]+) .*|\1 \4 \5 \6 \3 \8 \9 \2|
$1"
    else
        ps -A -o pid= -o ppid= -o pgid= -o sess= -o state= -o comm= | sed -n -E \
"s/^ *([0-9]+) +([0-9]+) +([0-9]+) +([0-9]+) +([A-Za-z])[^ ]* +(.*)/\1 \2 \3 \4 \5 1 0 \6/; $1"
    fi
}

# CONNECTION: the process of the connection; OWN: its child that this script is or runs under; SHARED: the session that
# is both theirs, where commands lead none; FILTER: the session in which this script runs.
find_connection() {
    CONNECTION=$UP OWN=$ME SHARED='' STEPS=0
    # The shell's own line needs no sed: nobody chose its name. The session is the fourth field behind that; and of all.
    if read -r LINE <"/proc/$ME/stat"; then
        set -- ${LINE##*) }
    else
        set -- $(table "/^$ME /p" "[0-9]+" "$ME")
    fi
    FILTER=${4:-}
    [ "$FILTER" ] && [ "$UP" -gt 1 ] || { say unsure; exit 0; }
    [ "$FILTER" != "$ME" ] || return 0
    # The server gave this connection a name, which what it started inherits and itself has not: so a login shell that
    # runs this as a child is passed by. What cannot be read is another user's: the server.
    [ "${SSH_CONNECTION:-}" ] || { say unsure; exit 0; }
    while named "$CONNECTION" | grep -F -x -q "SSH_CONNECTION=$SSH_CONNECTION"; do
        OWN=$CONNECTION STEPS=$((STEPS + 1))
        set -- $(table "/^$OWN /p" "[0-9]+" "$OWN")
        CONNECTION=${2:-0}
        [ "$CONNECTION" -gt 1 ] && [ $STEPS -lt 9 ] || { say unsure; exit 0; }
    done
    [ "$OWN" = "$FILTER" ] || SHARED=$FILTER
}

named() { tr '\000' '\n' <"/proc/$1/environ" | grep '^SSH_CONNECTION='; }

# OPEN: what is to end, as NUMBER:SESSION, or NUMBER:PID of a command in the shared session; of these, STARTS has PID=START
# and PIPES PID=PIPE, of its standard streams.
find_targets() {
    LEADERS='' TOTAL=0 FOUND='' STARTS=' ' LAST_START='' LAST_PID=0 SURE=yes
    IFS=$LINE_END
    for LINE in $(table "/^[0-9]+ $CONNECTION /p" "$CONNECTION" | sort -k 7,7n -k 1,1n); do
        IFS=$SPACE
        set -- $LINE
        if [ "$1" != "$4" ]; then
            [ "$SHARED" ] && [ "$4" = "$SHARED" ] || continue
            # One server process may serve many connections.
            ! named "$1" | grep -F -x -v -q "SSH_CONNECTION=$SSH_CONNECTION" || continue
            STARTS="$STARTS$1=$7 "
        fi
        # Numbers of processes begin anew at the end of their range: then the order within a tick is not known.
        [ "$7" = "$LAST_START" ] && [ $(($1 - LAST_PID)) -gt 10000 ] && SURE=
        [ "$7" != 0 ] || SURE=
        LAST_START=$7 LAST_PID=$1
        if [ "$1" = "$OWN" ]; then
            FOUND=yes
            [ "$7" = 0 ] || break
            continue
        fi
        TOTAL=$((TOTAL + 1))
        # Of a command that ended a moment ago the client will hear; until then it may not be the one that is meant.
        [ "$5" = Z ] && [ "$6" -le 1 ] && LEADERS="$LEADERS 0" || LEADERS="$LEADERS $1"
    done
    IFS=$SPACE
    # Behind a wrapper that cannot be passed by, what its parent started are not the commands.
    [ "$FOUND" ] || { say unsure; exit 0; }
    [ "$TOTAL" = "$COUNT" ] || { say recount "$TOTAL"; exit 0; }
    [ "$SURE" ] || [ "$TOTAL" = 1 ] || { say unsure; exit 0; }
    OPEN='' PIPES=' ' PIPED=' 0 ' KNOWN=' ' FAMILIES=' ' OWN_SESSION=$FILTER
    for NUMBER in $NUMBERS; do
        set -- $LEADERS
        shift $((NUMBER - 1))
        [ "$1" != 0 ] || { say recount "$TOTAL"; exit 0; }
        OPEN="$OPEN $NUMBER:$1"
        case $STARTS in
            *" $1="*) open_family "$1" ;;
            *) FILTER="$FILTER|$1" ;;
        esac
    done
}

# A command that leads no session: what marks its family.
open_family() {
    START=${STARTS#*" $1="}
    FAMILIES="$FAMILIES$1 " KNOWN="$KNOWN$1.${START%% *}=$1 "
    note_pipes "$1"
}

note_pipes() {
    [ "${MINE:-}" ] || MINE=" $(pipes "$ME")"
    for PIPE in $(pipes "$1"); do
        case $MINE in *" $PIPE "*) ;; *) PIPES="$PIPES$1=$PIPE " ;; esac
    done
    PIPED="$PIPED$1 "
}

# The pipes among the standard streams of a process, with a blank behind each.
pipes() {
    ls -l "/proc/$1/fd/0" "/proc/$1/fd/1" "/proc/$1/fd/2" | sed -n 's/.* -> pipe:\[\([0-9]*\)\]$/\1/p' | tr '\n' ' '
}

# LEFT: what lives in the sessions, a line each: SESSION PID GROUP STATE NAME; KEY: of that, what is worth telling.
# What lives in an inner session stands under the one that it belongs to; its group is 0 where TERM comes to it by its
# runner. False: the look itself failed.
survey() {
    FOUND='' SEEN='' FOUND_KEY='' KEPT=' ' RUNNERS='' OWNERS=' ' MATES=''
    IFS=$LINE_END
    for LINE in $(table "/^[0-9]+ [0-9]+ [0-9]+ ($FILTER) /p" "[0-9]+ -?[0-9]+ ($FILTER)"); do
        IFS=$SPACE
        set -- $LINE
        [ "$1" = "$ME" ] && SEEN=yes
        # The first thread of a process may have ended before the others.
        case $5 in [ZX]) [ "$6" -gt 1 ] || continue ;; esac
        if [ "$4" = "$OWN_SESSION" ]; then
            [ -z "$SHARED" ] || MATES="$MATES$LINE$LINE_END"
            continue
        fi
        SESSION=$4 PID=$1 GROUP=$3 STATE=$5
        case $INNER in *" $4:"*)
            SESSION=${INNER#*" $4:"}
            SESSION=${SESSION%% *}
            case $KEPT in *" $4:"*) ;; *) KEPT="$KEPT$4:$SESSION " ;; esac
            case $RELAYED in *" $4 "*) GROUP=0 ;; esac
            ;;
        esac
        shift 7
        take "$*"
    done
    IFS=$SPACE
    # Who does not see himself has seen nothing: no process could be started, perhaps.
    [ "$SEEN" ] || return 1
    [ -z "$SHARED" ] || find_family
    LEFT=$FOUND KEY=$FOUND_KEY INNER=$KEPT
    look_inside && survey
    return 0
}

# Take the process PID, with its name, as a part of SESSION.
take() {
    case $1 in sudo | su | runuser) RUNNERS="$RUNNERS|$PID" OWNERS="$OWNERS$PID:$SESSION " ;; esac
    FOUND="$FOUND$SESSION $PID $GROUP $STATE $1$LINE_END"
    case $STATE in [RS]) FOUND_KEY="$FOUND_KEY $PID" ;; *) FOUND_KEY="$FOUND_KEY $PID$STATE" ;; esac
}

# Whose each of MATES is, those in the session that all commands share: its parent's; what it was when it was last seen,
# since an orphan has lost its parent; or his whose pipe it has for one of its streams, for each command has its own.
# Parents are taken before their children, so that a shell gets TERM first and runs no next command.
# STRAYS: starts of orphans of which nothing tells whose they are; perhaps what earlier commands have left on purpose.
find_family() {
    OF=" $OWN:. $CONNECTION:- " STRAYS=' '
    while [ "$MATES" ]; do
        MORE='' REST=''
        IFS=$LINE_END
        for LINE in $MATES; do
            IFS=$SPACE
            set -- $LINE
            case "$KNOWN;$OF" in
                *" $1.$7="*) WHOSE=${KNOWN#*" $1.$7="} ;;
                *" $1:"*) WHOSE=${OF#*" $1:"} ;;
                *" $2:"*) WHOSE=${OF#*" $2:"} ;;
                *) WHOSE='' ;;
            esac
            WHOSE=${WHOSE%% *}
            if [ -z "$WHOSE" ]; then
                REST="$REST$LINE$LINE_END"
                continue
            fi
            MORE=yes OF="$OF$1:$WHOSE "
            belongs "$@"
        done
        IFS=$SPACE
        MATES=$REST
        [ "$MORE" ] || adopt
    done
}

# What a process of the shared session is, of which WHOSE is known: `.` of this script, `-` of other commands, `?` nobody's.
belongs() {
    [ "$WHOSE" != . ] || return 0
    case $KNOWN in *" $1.$7="*) ;; *) KNOWN="$KNOWN$1.$7=$WHOSE " ;; esac
    case $WHOSE in
        -) ;;
        \?) STRAYS="$STRAYS$7 " ;;
        *)
            case $FAMILIES in *" $WHOSE "*) ;; *) return 0 ;; esac
            SESSION=$WHOSE PID=$1 GROUP=- STATE=$5
            shift 7
            take "$*"
            ;;
    esac
}

# The first of MATES is an orphan: find out whose by its pipes. (Those of other commands are looked at when there is one.)
adopt() {
    IFS=$LINE_END
    set -- $MATES
    IFS=$SPACE
    set -- $1
    WHOSE='?'
    for PID in $LEADERS; do
        case $PIPED in *" $PID "*) ;; *) note_pipes "$PID" ;; esac
    done
    for PIPE in $(pipes "$1"); do
        case $PIPES in
            *"=$PIPE "*)
                WHOSE=${PIPES%%"=$PIPE "*}
                WHOSE=${WHOSE##* }
                ;;
        esac
    done
    KNOWN="$KNOWN$1.$7=$WHOSE "
}

# Whether one of STRAYS may be of this command: nothing that is older.
strays() {
    START=${STARTS#*" $1="}
    for STRAY in $STRAYS; do
        [ "$STRAY" -lt "${START%% *}" ] || return 0
    done
    return 1
}

# Some programs run a command in a session of its own, wait for it, and hand on the TERM that they get: sudo where it has
# a terminal, su and runuser with a command. INNER: these sessions, as NUMBER:SESSION to which it belongs;
# RELAYED: those whose runner lives. A second TERM would mean "at once" to some commands. True: there are new ones.
look_inside() {
    RELAYED=' ' NEW=''
    [ "$RUNNERS" ] || return 1
    RUNNERS=${RUNNERS#|}
    IFS=$LINE_END
    for LINE in $(table "/^[0-9]+ ($RUNNERS) /p" "($RUNNERS)"); do
        IFS=$SPACE
        set -- $LINE
        [ "$1" = "$4" ] || continue
        case $5 in [ZX]) [ "$6" -gt 1 ] || continue ;; esac
        RELAYED="$RELAYED$1 "
        case $INNER in *" $1:"*) continue ;; esac
        OWNER=${OWNERS#*" $2:"}
        INNER="$INNER$1:${OWNER%% *} " FILTER="$FILTER|$1" NEW=yes
    done
    IFS=$SPACE
    [ "$NEW" ]
}

# The first TERM: a group gets it at once, and none of its processes a second one.
term_groups() {
    for TARGET in $OPEN; do
        family "${TARGET#*:}" || kill -s TERM -- "-${TARGET#*:}"
    done
    IFS=$LINE_END
    for LINE in $LEFT; do
        IFS=$SPACE
        set -- $LINE
        [ "$3" != 0 ] || continue
        TOLD="$TOLD$2 "
        [ "$1" = "$3" ] || kill -s TERM "$2"
    done
    IFS=$SPACE
    for TARGET in $OPEN; do
        count "${TARGET#*:}"
        say told "${TARGET%%:*}" "$N"
    done
}

# N: how many processes are left of a session.
count() {
    WANTED=$1 N=0
    IFS=$LINE_END
    for LINE in $LEFT; do
        [ "${LINE%% *}" = "$WANTED" ] && N=$((N + 1))
    done
    IFS=$SPACE
}

# TERM to what was started since, or whose runner has gone.
term_new() {
    IFS=$LINE_END
    for LINE in $LEFT; do
        IFS=$SPACE
        set -- $LINE
        [ "$3" != 0 ] || continue
        case $TOLD in *" $2 "*) continue ;; esac
        TOLD="$TOLD$2 "
        kill -s TERM "$2"
    done
    IFS=$SPACE
}

kill_all() {
    for TARGET in $HIDDEN; do
        family "${TARGET#*:}" || kill -s KILL -- "-${TARGET#*:}"
    done
    IFS=$LINE_END
    for LINE in $LEFT; do
        IFS=$SPACE
        set -- $LINE
        [ "$1" = "$3" ] && kill -s KILL -- "-$1" || kill -s KILL "$2"
    done
    IFS=$SPACE
}

# Say what changed, and leave what is gone out of OPEN.
settle() {
    [ "$KEY" != "$SAID" ] || [ "$HIDDEN" ] || return 0
    STILL='' FILTER=$OWN_SESSION HIDDEN=''
    for TARGET in $OPEN; do
        count "${TARGET#*:}"
        if [ $N -gt 0 ]; then
            # Only of these: the number of a session that is gone may be another's a moment later.
            keep
            # Who says too much is not listened to, and would wait here in the end.
            [ $BUDGET -gt 0 ] && [ "$KEY" != "$SAID" ] || continue
            describe "${TARGET%%:*}" "${TARGET#*:}"
            say left "${TARGET%%:*}" $N
        elif hidden "${TARGET#*:}"; then
            # Perhaps not for long. An orphan that nobody knows is waited for less: it gets no KILL.
            family "${TARGET#*:}" && HIDDEN_LOOKS=$((HIDDEN_LOOKS + 1))
            if [ $HIDDEN_LOOKS -gt 8 ] && family "${TARGET#*:}"; then
                say hidden "${TARGET%%:*}"
                continue
            fi
            keep
            HIDDEN="$HIDDEN $TARGET"
        else
            say gone "${TARGET%%:*}"
        fi
    done
    OPEN=$STILL SAID=$KEY
    for TARGET in $INNER; do
        FILTER="$FILTER|${TARGET%%:*}"
    done
}

keep() {
    STILL="$STILL $TARGET"
    family "${TARGET#*:}" || FILTER="$FILTER|${TARGET#*:}"
}

family() { case $FAMILIES in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# At most 16 processes of a session.
describe() {
    NUMBER=$1 WANTED=$2 SHOWN=0
    IFS=$LINE_END
    for LINE in $LEFT; do
        IFS=$SPACE
        set -- $LINE
        [ "$1" = "$WANTED" ] && [ $SHOWN -lt 16 ] || continue
        SHOWN=$((SHOWN + 1)) BUDGET=$((BUDGET - 1)) PID=$2 STATE=$4 WCHAN=
        shift 4
        read -r WCHAN <"/proc/$PID/wchan"
        say proc "$NUMBER" "$PID" "$STATE" "${WCHAN:-0}" "$*"
    done
    IFS=$SPACE
}

# Whether something may be left that we do not see: in the group of a session, of another user and kept from our eyes
# (hidepid); of a family, anything that is kept from them, an orphan, or the command itself in a session of its own.
hidden() {
    if family "$1"; then
        [ -r /proc/1/stat ] || return 0
        strays "$1" || kill -s 0 "$1"
        return
    fi
    [ ! -r /proc/1/stat ] || return 1
    if SAYS=$(kill -s 0 -- "-$1" 2>&1); then
        # We may signal it (sudo lets its caller do that); or it is a dead one of our own.
        [ -z "$(table "/^[0-9]+ [0-9]+ $1 /p" "[0-9]+ $1")" ]
    else
        case $SAYS in *ermitted*) return 0 ;; *) return 1 ;; esac
    fi
}

# Whether anything is left of commands of this connection that have ended: a session without its leader that has a
# process which is no older than the connection, or one whose leader has lost its parent. It may be another user's, too.
look() {
    [ -z "$SHARED" ] && [ -r /proc/1/stat ] || { say unsure; exit 0; }
    set -- $(table "/^$CONNECTION /p" "[0-9]+" "$CONNECTION")
    SINCE=${7:-} FOUND='' LIVING=' ' PLACE=$(cat "/proc/$ME/cgroup")
    ALL=$(table "/^/p" "[0-9]+")
    IFS=$LINE_END
    for LINE in $ALL; do
        IFS=$SPACE
        set -- $LINE
        [ "$1" != "$4" ] || LIVING="$LIVING$1:$5$6 "
        [ "$1" != "$ME" ] || FOUND=yes
    done
    [ "$FOUND" ] && [ "$SINCE" ] || { say unsure; exit 0; }
    IFS=$LINE_END
    for LINE in $ALL; do
        IFS=$SPACE
        set -- $LINE
        case $5 in [ZX]) [ "$6" -gt 1 ] || continue ;; esac
        [ "$4" != 0 ] && [ "$7" -ge "$SINCE" ] || continue
        case $LIVING in
            *" $4:Z1 "* | *" $4:X1 "*) ;;
            *" $4:"*) [ "$1" = "$4" ] && [ "$2" -le 1 ] || continue ;;
        esac
        # Another login's, where each has a control group (systemd), or another connection's.
        [ "$(cat "/proc/$1/cgroup")" = "$PLACE" ] || continue
        ! named "$1" | grep -F -x -v -q "SSH_CONNECTION=${SSH_CONNECTION:-}" || continue
        say unclean
        exit 0
    done
    say clean
    exit 0
}

ctask_end "$@"
