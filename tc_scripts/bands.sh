# What the tc scripts share: reading options, checking them, and the objects of the tree. Sourced, not run.
#
# The tree is the one the host agent builds (hostagent/qdisc/plan.py); a test compares the two. Handles: `fab:` is the
# root, `fab:10` the HTB class at the link rate, `fab:1` to `fab:8` the levels, `fa1:` to `fa8:` their queues.
# shellcheck shell=sh
# shellcheck disable=SC2034  # the scripts that source this file use what it sets

handle=fab
leaf_limit_bytes=33554432 # per level, 32 MiB: what fq_codel allows itself
interface= # what the script works on
dry_run=
replace=

fail() { # fail EXIT-CODE MESSAGE: one line, then out
    echo "${0##*/}: $2" >&2
    exit "$1"
}

run() { # show the command under --dry-run, else do it; a tree that cannot be finished goes away again
    if [ -n "$dry_run" ]; then
        echo "$*"
    elif ! "$@"; then
        case $(root_qdisc "$interface") in *" $handle:") tc qdisc del dev "$interface" root ;; esac
        fail 1 "this failed, and nothing of ours is left on $interface: $*"
    fi
}

need_value() { # need_value COUNT OPTION: an option that takes a value has one
    [ "$1" -ge 2 ] || fail 2 "$2 needs a value; see --help"
}

is_number() {
    case $1 in
    '' | *[!0-9]*) return 1 ;;
    esac
    [ "${#1}" -le 15 ]
}

is_in_range() { # is_in_range TEXT LOW HIGH: a whole number without leading zeros (which the shell reads as octal)
    case $1 in 0?*) return 1 ;; esac
    is_number "$1" && [ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}

scaled() { # scaled NUMBER FACTOR WHAT: the product of a whole number and a factor
    is_number "$1" || fail 2 "$3"
    number=${1#"${1%%[!0]*}"} # without leading zeros, which would make it octal
    echo $((${number:-0} * $2))
}

rate_bps() { # rate_bps TEXT: 200mbit, 10gbit or bits per second, as bits per second
    wrong="rate '$1' is not understood; write it like 200mbit or 10gbit, as a whole number"
    lower=$(echo "$1" | tr '[:upper:]' '[:lower:]')
    case $lower in
    *kbit) rate=$(scaled "${lower%kbit}" 1000 "$wrong") ;;
    *mbit) rate=$(scaled "${lower%mbit}" 1000000 "$wrong") ;;
    *gbit) rate=$(scaled "${lower%gbit}" 1000000000 "$wrong") ;;
    *bit) rate=$(scaled "${lower%bit}" 1 "$wrong") ;;
    *) rate=$(scaled "$lower" 1 "$wrong") ;;
    esac || exit 2
    [ "$rate" -ge 1000000 ] || fail 2 "rate '$1' is too small; it must be at least 1mbit"
    echo "$rate"
}

size_bytes() { # size_bytes TEXT: 300KB, 2MB (decimal) or bytes, as bytes
    wrong="size '$1' is not understood; write it like 300KB or 2MB, as a whole number"
    case $1 in
    *[kK][bB]) scaled "${1%??}" 1000 "$wrong" ;;
    *[mM][bB]) scaled "${1%??}" 1000000 "$wrong" ;;
    *) scaled "$1" 1 "$wrong" ;;
    esac
}

check_levels() {
    case $1 in
    [2-8]) ;;
    *) fail 2 "levels '$1'; the number of levels must be 2 to 8" ;;
    esac
}

check_interface() {
    [ -n "$1" ] || fail 2 "name a network interface; see --help"
    command -v tc >/dev/null || fail 3 "there is no tc here; install the package iproute2"
    ip link show dev "$1" >/dev/null 2>&1 || fail 2 "there is no network interface '$1'; 'ip link' lists them"
}

root_qdisc() { # root_qdisc INTERFACE: kind and handle of the root, such as "htb fab:"
    tc qdisc show dev "$1" root 2>/dev/null | awk '$1 == "qdisc" { print $2, $3; exit }'
}

clear_root() { # make room at the root: ours goes, a kernel default gives way by itself, a foreign one is refused
    found=$(root_qdisc "$1")
    case $found in
    '' | *" 0:") ;;
    *" $handle:") run tc qdisc del dev "$1" root ;;
    *)
        [ -n "$replace" ] || fail 2 "$1 has a qdisc that somebody configured ($found); --replace overwrites it for good"
        ;;
    esac
}

has_qdisc() { # has_qdisc KIND: whether this kernel has it, tried on a temporary interface
    scratch=fptry$$
    for type in dummy veth ifb; do
        ip link add "$scratch" type $type 2>/dev/null && break
    done
    ip link show dev "$scratch" >/dev/null 2>&1 ||
        fail 3 "cannot make a temporary interface to see which qdiscs there are; run as root, or name --kind and --leaf"
    options=
    [ "$1" = bfifo ] && options="limit 65536"
    # shellcheck disable=SC2086  # words on purpose
    tc qdisc add dev "$scratch" root "$1" $options 2>/dev/null
    answer=$?
    ip link del "$scratch"
    return $answer
}

trunk() { # trunk INTERFACE RATE LEVELS: the HTB class of the link and one class per level
    # A bucket of 1 ms; a trickle of 8 kbit/s per level; a quantum, so that the kernel does not ask for r2q.
    burst=$((($2 + 7999) / 8000))
    run tc class add dev "$1" parent $handle: classid $handle:10 htb \
        rate "$2bit" ceil "$2bit" burst $burst cburst $burst quantum 60000 prio 0
    level=0
    while [ $level -lt "$3" ]; do
        run tc class add dev "$1" parent $handle:10 classid $handle:$((level + 1)) htb \
            rate 8000bit ceil "$2bit" burst 1600 cburst $burst quantum 60000 prio $level
        level=$((level + 1))
    done
}

u32() { # u32 PORT PREFERENCE PROTOCOL LEVEL MATCH...: packets of the protocol that match go to the level
    port=$1 preference=$2 protocol=$3 to=$4
    shift 4
    run tc filter add dev "$port" parent $handle: protocol "$protocol" prio "$preference" \
        u32 match "$@" flowid $handle:$((to + 1))
}
