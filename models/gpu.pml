/* Operations of GPU ranks: what each rank's stream runs, one kernel after the other. The kernels are in pull.pml and
   push.pml, what they share in rank.pml. docs/protocol.md says which of it is what in the code. */

#ifndef R
#define R 2
#endif
#ifndef KINDS	/* of operations: see rank.pml */
#define KINDS 7
#endif
#ifndef LENGTH	/* operations; 0 = without end */
#define LENGTH 0
#endif
#ifndef STAGES	/* 1: tensors can be direct, 2: can be staged */
#define STAGES 3
#endif
#ifndef FEWEST	/* tokens of a rank, in rounds: FEWEST or MOST */
#define FEWEST 0
#endif
#ifndef MOST
#define MOST 3
#endif
#ifndef HOOKS	/* 1: low-latency operations can be received in the kernel that sends, 2: by a hook */
#define HOOKS 3
#endif
#ifndef DISAGREE	/* whether ranks can call different things */
#define DISAGREE 0
#endif
#ifndef QUITS	/* whether a rank can stop before any operation, while others go on */
#define QUITS 0
#endif
#define DEPTH 2	/* slots of the push area */

/* What can be wrong, one at a time. */
#define NONE 0
#define NO_RELEASE_WAIT 1	/* a message is written over one that is still read */
#define FLAG_BEFORE_MESSAGE 2	/* published without release: before the message */
#define FLAG_BEFORE_TENSOR 23	/* before the rows that are read in place */
#define FLAG_BEFORE_ROUND 3	/* likewise before the staged rows */
#define ANY_EPOCH 4	/* a message of an earlier operation will do */
#define ANY_ROUND 5	/* the round before will do */
#define REUSED_EPOCH 6	/* a cached dispatch does not count as an operation */
#define NO_HALF_WAIT 7	/* a half of the stage is filled while it is read */
#define ONE_HALF 8	/* all rounds in the same half */
#define ALL_TAKE_PART 9	/* a combine waits for ranks that have no tokens in the round */
#define ROUND_RELEASED_EARLY 10	/* before it is read */
#define RELEASE_BEFORE_READING 11
#define OWNER_LEAVES 12	/* a direct operation ends before all have read its rows */
#define NO_COMPARING 13	/* of signatures */
#define NO_DEADLINE 14
#define NO_CREDIT 15	/* a slot is used again without */
#define CREDIT_BEFORE_READING 16	/* as soon as the flags are there, not with the next kernel */
#define CREDIT_AFTER_PUSH 17	/* given only when the own rows may be pushed */
#define OWN_FLAG_IGNORED 18	/* a receiver goes on while the releaser of its kernel may still run */
#define FLAG_BEFORE_ROWS 19	/* pushed without release */
#define FLAG_BEFORE_WEIGHTS 20	/* weighed without release */
#define ANY_NUMBER 21	/* rows of an earlier operation in the slot will do */
#define NO_RECEIVE_BEFORE_REUSE 22	/* of the operation whose slot comes round again */
#ifndef MUTANT
#define MUTANT NONE
#endif

#define HAS_PULL (KINDS & 7)
#define HAS_PUSH (KINDS & 24)
#if HAS_PULL
#define PULL_CELLS (R * (R + 3))
#else
#define PULL_CELLS 0
#endif
#if HAS_PUSH
#define CELLS (PULL_CELLS + 2 * DEPTH * R * R)
#else
#define CELLS PULL_CELLS
#endif
#define CELL byte
#include "rank.pml"
byte running[R];	/* programs of the kernel, a bit each */
bool failed[R];
#if HAS_PULL
#include "pull.pml"
#endif
#if HAS_PUSH
#include "push.pml"
#endif

proctype stream(byte me)
{
next_call:
	if
	:: atomic {
		next_operation();
		if
		:: op[me] == DESTROY -> goto destroyed
#if HAS_PUSH
		:: IS_LOW(op[me]) -> goto low_latency
#endif
#if HAS_PULL
		:: else -> start_pull()
#endif
		fi
	   };
#if HAS_PULL
	   close_pull()
#endif
#if HAS_PUSH
	/* Hooks may be called in any order, late, or never. */
	:: atomic { hooks[me] & 1 -> start_receive(0); running[me] == 0 -> goto received_one }
	:: atomic { hooks[me] & 2 -> start_receive(1); running[me] == 0 -> goto received_one }
#endif
	:: atomic { QUITS -> goto destroyed }
	fi;
#if HAS_PUSH
low_latency:
	atomic {
		if	/* hazard: a slot comes round whose operation is not received */
		:: (hooks[me] & (1 << ((sent[me] + 1) % DEPTH))) && MUTANT != NO_RECEIVE_BEFORE_REUSE ->
			start_receive((sent[me] + 1) % DEPTH);
			running[me] == 0
		:: else
		fi;
		if
		:: !failed[me] -> start_push(); running[me] == 0
		:: else
		fi;
		forget_numbers();
received_one:
		op[me] = 0;
		if
		:: failed[me] -> goto destroyed
		:: else -> goto next_call
		fi
	};
#endif
destroyed:
	atomic {
		gone[me] = true;
nobody_fails:	/* while all go on to the end */
		assert(!failed[me] || QUITS)
	}
}

init {
	atomic {
#if HAS_PULL
		for (i : 0 .. R * R - 1) { released[i] = WORD(0, ALL) }
		for (i : 0 .. R - 1) { epoch[i] = 1; run owner(i); run reader(i) }
#endif
#if HAS_PUSH
		for (i : 0 .. R - 1) { run sender(i); run releaser(i); run receiver(i) }
#endif
		for (i : 0 .. R - 1) { run stream(i) }
		i = 0
	}
}
