# SPDX-License-Identifier: Apache-2.0
# Ends commands of the SSH connection by which it comes. ending.py sends it and reads what it says:
#
#     /bin/sh -s WORD POLICY GRACE COUNT NUMBER...
#
# WORD      stands before all that it says, since a login shell may print as well
# POLICY    kill (TERM, GRACE, KILL) or term (TERM, and nothing after GRACE)
# GRACE     in hundredths of a second
# COUNT     how many commands the connection runs here, those left out that were asked for after this script
# NUMBER... which of them are to end, in the order of their exec requests, from 1 on
#
# No command has a mark. All are children of the process that is the connection, as this script is, and lead a
# session of their own; what a command starts is in its session, unless it leaves that on purpose. What sudo and its
# like run in sessions of their own, and wait for, is a part of the command all the same (look_inside).
#
# It says: `recount N` (it finds N commands), `unsure` (it cannot tell them apart), else `ending` and, of each number,
# `told NUMBER N` (N processes were told to end), then as often as that changes `proc NUMBER PID STATE WCHAN NAME` of
# what is left, closed by `left NUMBER N`; at last `gone NUMBER`, `alive NUMBER` or `hidden NUMBER` (of other users,
# and /proc does not show them).
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
    # Names are bytes.
    LC_ALL=C IFS=$SPACE
    export LC_ALL

    find_targets
    say ending
    now
    PHASE=term END=$((NOW + GRACE)) STEP=2 TOLD=' ' SAID=- BUDGET=400 INNER=' ' RELAYED=' ' HIDDEN=''
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
table() {
    if [ -r "/proc/$ME/stat" ]; then
        set +f
        grep -E "[)] [A-Za-z] $2 " /proc/[0-9]*/stat /dev/null | sed -n -E "s|^(/proc/[0-9]+/stat:)[0-9]+ [(]|\1|
s|^/proc/([0-9]+)/stat:(.*)[)] ([A-Za-z]) ([0-9]+) (-?[0-9]+) (-?[0-9]+) \
(-?[0-9]+ ){13}([0-9]+) -?[0-9]+ ([0-9]+) .*|\1 \4 \5 \6 \3 \8 \9 \2|
$1"
    else
        ps -A -o pid= -o ppid= -o pgid= -o sess= -o state= -o comm= | sed -n -E \
"s/^ *([0-9]+) +([0-9]+) +([0-9]+) +([0-9]+) +([A-Za-z])[^ ]* +(.*)/\1 \2 \3 \4 \5 1 0 \6/; $1"
    fi
}

# OPEN: the sessions that are to end, as NUMBER:SESSION.
find_targets() {
    LEADERS='' TOTAL=0 OWN='' SURE=yes LAST_START='' LAST_PID=0
    IFS=$LINE_END
    for LINE in $(table "/^[0-9]+ $UP /p" "$UP" | sort -k 7,7n -k 1,1n); do
        IFS=$SPACE
        set -- $LINE
        [ "$1" = "$4" ] || continue
        # Numbers of processes begin anew at the end of their range: then the order within a tick is not known.
        [ "$7" = "$LAST_START" ] && [ $(($1 - LAST_PID)) -gt 10000 ] && SURE=
        [ "$7" != 0 ] || SURE=
        LAST_START=$7 LAST_PID=$1
        if [ "$1" = "$ME" ]; then
            OWN=yes
            [ "$7" = 0 ] || break
            continue
        fi
        TOTAL=$((TOTAL + 1))
        # Of a command that ended a moment ago the client will hear; until then it may not be the one that is meant.
        [ "$5" = Z ] && [ "$6" -le 1 ] && LEADERS="$LEADERS 0" || LEADERS="$LEADERS $1"
    done
    IFS=$SPACE
    # Behind a wrapper, this script leads no session, and what its parent started are not the commands.
    [ "$OWN" ] && [ "$UP" -gt 1 ] || { say unsure; exit 0; }
    [ "$TOTAL" = "$COUNT" ] || { say recount "$TOTAL"; exit 0; }
    [ "$SURE" ] || [ "$TOTAL" = 1 ] || { say unsure; exit 0; }
    OPEN='' FILTER=$ME
    for NUMBER in $NUMBERS; do
        set -- $LEADERS
        shift $((NUMBER - 1))
        [ "$1" != 0 ] || { say recount "$TOTAL"; exit 0; }
        OPEN="$OPEN $NUMBER:$1" FILTER="$FILTER|$1"
    done
}

# LEFT: what lives in the sessions, a line each: SESSION PID GROUP STATE NAME; KEY: of that, what is worth telling.
# What lives in an inner session stands under the one that it belongs to; its group is 0 where TERM comes to it by its
# runner. False: the look itself failed.
survey() {
    FOUND='' SEEN='' FOUND_KEY='' KEPT=' ' RUNNERS='' OWNERS=' '
    IFS=$LINE_END
    for LINE in $(table "/^[0-9]+ [0-9]+ [0-9]+ ($FILTER) /p" "[0-9]+ -?[0-9]+ ($FILTER)"); do
        IFS=$SPACE
        set -- $LINE
        [ "$1" = "$ME" ] && SEEN=yes
        [ "$4" != "$ME" ] || continue
        # The first thread of a process may have ended before the others.
        case $5 in [ZX]) [ "$6" -gt 1 ] || continue ;; esac
        SESSION=$4 PID=$1 GROUP=$3 STATE=$5
        case $INNER in *" $4:"*)
            SESSION=${INNER#*" $4:"}
            SESSION=${SESSION%% *}
            case $KEPT in *" $4:"*) ;; *) KEPT="$KEPT$4:$SESSION " ;; esac
            case $RELAYED in *" $4 "*) GROUP=0 ;; esac
            ;;
        esac
        shift 7
        case $* in sudo | su | runuser) RUNNERS="$RUNNERS|$PID" OWNERS="$OWNERS$PID:$SESSION " ;; esac
        FOUND="$FOUND$SESSION $PID $GROUP $STATE $*$LINE_END"
        case $STATE in [RS]) FOUND_KEY="$FOUND_KEY $PID" ;; *) FOUND_KEY="$FOUND_KEY $PID$STATE" ;; esac
    done
    IFS=$SPACE
    # Who does not see himself has seen nothing: no process could be started, perhaps.
    [ "$SEEN" ] || return 1
    LEFT=$FOUND KEY=$FOUND_KEY INNER=$KEPT
    look_inside && survey
    return 0
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
        kill -s TERM -- "-${TARGET#*:}"
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
        kill -s KILL -- "-${TARGET#*:}"
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
    STILL='' FILTER=$ME HIDDEN=''
    for TARGET in $OPEN; do
        count "${TARGET#*:}"
        if [ $N -gt 0 ]; then
            # Only of these: the number of a session that is gone may be another's a moment later.
            STILL="$STILL $TARGET" FILTER="$FILTER|${TARGET#*:}"
            # Who says too much is not listened to, and would wait here in the end.
            [ $BUDGET -gt 0 ] && [ "$KEY" != "$SAID" ] || continue
            describe "${TARGET%%:*}" "${TARGET#*:}"
            say left "${TARGET%%:*}" $N
        elif hidden "${TARGET#*:}"; then
            # Perhaps not for long.
            STILL="$STILL $TARGET" FILTER="$FILTER|${TARGET#*:}" HIDDEN="$HIDDEN $TARGET"
        else
            say gone "${TARGET%%:*}"
        fi
    done
    OPEN=$STILL SAID=$KEY
    for TARGET in $INNER; do
        FILTER="$FILTER|${TARGET%%:*}"
    done
}

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

# Whether something is left in the group of a session, of another user and kept from our eyes (hidepid).
hidden() {
    [ ! -r /proc/1/stat ] || return 1
    if SAYS=$(kill -s 0 -- "-$1" 2>&1); then
        # We may signal it (sudo lets its caller do that); or it is a dead one of our own.
        [ -z "$(table "/^[0-9]+ [0-9]+ $1 /p" "[0-9]+ $1")" ]
    else
        case $SAYS in *ermitted*) return 0 ;; *) return 1 ;; esac
    fi
}

ctask_end "$@"
