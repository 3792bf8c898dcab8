"""IRPO: GRPO post-training of an image restorer. The method is `post_train`, from top to bottom.

    python train.py --hard-ratio 0.3      post-trains the demo model, nothing downloaded

Its flags are in config.py.
"""

import copy
import sys
from functools import partial

import torch

import grpo
import mining
import runs
import study
from config import parse
from data import Crops
from model import load_pretrained
from policy import USUAL, load_policy, policy_for, states_on

# -------------------------------------------------------------------------------------- the method


def post_train(config, run, pretrained, reward, samples, val, judge=None, checkpoint=None):
    """IRPO: mines the samples, attaches a policy to the pre-trained model, trains both. Returns the
    State after the last step.

    run: runs.Run, entered; reward: rewards.Reward; val: samples that choose best.pt; judge:
    judge.Judge; checkpoint: what a run that goes on had saved.
    """
    # Sec. 3.2: the training images that the pre-trained model restores worst
    hard = mining.hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)

    # Eq. 4: six heads that start where the pre-trained model is; π_ref stays there
    state = attach(config, pretrained, crops, checkpoint)
    model, policy = state.live.values()
    run.start(state, config.objective, shown=dict(reward="reward", psnr="psnr_det", kl="kl"))

    for batch in run.batches(crops, config.training.batch_size):
        study.validate_when_due(config, run, reward, val)
        state.set_rates(config.training)

        # Eq. 4, 5: encode once, decode G sampled actions without graph
        generators = study.generators_of(config, batch.numbers)
        with study.half_precision(config):
            encoding = model.encode(batch.degraded)
            group = grpo.rollout(model, policy, encoding, config.policy.group_size, generators)

        # Eq. 22, 8: reward every rollout, normalise within its group
        scores, terms = reward(group.restored, batch.degraded, batch.gt, batch.tasks, judge)
        advantages = study.advantages(scores, config.policy, generators)  # (B, G)

        # Eq. 1, 2: the best rollout and the mean action again, with graph, train the backbone
        chosen = study.chosen_rollout(scores, config.policy, generators)  # g*
        best_actions = grpo.pick(group.actions, chosen)
        with study.half_precision(config):
            best, mean = grpo.decode_best_and_mean(model, policy, encoding, best_actions)
        weight_rl, weight_sup = study.image_weights(mean, batch.gt, config.policy)
        loss_sup, loss_cons = grpo.supervised_losses(best, mean, batch.gt, weight_sup)

        # Eq. 6, 9–11: the stored states and actions train the heads
        with torch.no_grad():
            old, *_ = policy.evaluate(group.states, group.actions)  # log π_old
        # Above one inner epoch the heads take some steps alone first: ρ leaves 1, the clip can bind
        for _ in range(config.policy.inner_epochs - 1):
            loss_rl, _ = heads_loss(config.policy, state, group, old, advantages, weight_rl)
            state.optimizer.zero_grad()
            loss_rl.backward()
            run.descend([state.optimizer], loss_rl)
        loss_rl, learned = heads_loss(config.policy, state, group, old, advantages, weight_rl)

        # Eq. 7: one objective, one backward pass, one step
        loss = grpo.total_loss(
            loss_rl,
            loss_sup,
            loss_cons,
            state.progress,
            sup_weights=config.policy.lambda_sup,
            cons_weights=config.policy.lambda_cons,
        )
        state.optimizer.zero_grad()
        loss.backward()
        metrics = study.describe(scores, terms, judge) | learned
        metrics |= {"loss/sup": loss_sup, "loss/cons": loss_cons}
        metrics |= {"psnr_in": study.batch_psnr(batch.degraded, batch.gt)}
        metrics |= {"psnr_best": study.batch_psnr(best, batch.gt)}
        metrics |= {"psnr_det": study.batch_psnr(mean, batch.gt)}
        run.update([state.optimizer], loss, metrics)
    study.validate_when_due(config, run, reward, val)
    return state


def attach(config, pretrained, crops, checkpoint=None):
    """The `study.State` with a policy attached to a copy of the pre-trained model, such that the
    deterministic output is the model's; or the one of a checkpoint."""
    training = config.training
    torch.manual_seed(config.seed)
    model = copy.deepcopy(pretrained)
    model.config["mask_rule"] = config.policy.mask_rule
    policy = load_policy(checkpoint) or policy_for(model, config.policy.concentration)
    policy = policy.to(config.device)
    if not checkpoint:
        usual = (batch.degraded for batch in crops.batches_of_each_task(USUAL))
        policy.fit(states_on(model, policy, usual))
    model.requires_grad_(not config.policy.freeze_backbone)
    policy.requires_grad_(not config.policy.freeze_heads)
    live = torch.nn.ModuleDict(dict(model=model, policy=policy))
    rates = dict(policy=training.lr * config.policy.head_lr_factor, model=training.lr)
    state = study.begin(config, live, rates, crops, reference=policy.frozen_copy())
    if checkpoint:
        state.load(checkpoint)
    return state


def heads_loss(settings, state, group, old, advantages, weights):
    """Eq. 6 on the stored states and actions of a `grpo.Group`, and its metrics. old: log π_old,
    advantages: (B, G); weights: (B,), of the images."""
    policy, reference = state.live["policy"], state.reference
    log_prob, entropy, statistics = policy.evaluate(group.states, group.actions)
    with torch.no_grad():
        ref, *_ = reference.evaluate(group.states, group.actions)
    exact_kl = policy.kl(reference, group.states) if settings.kl == "exact" else None
    loss, metrics = grpo.grpo_loss(
        log_prob,
        old,
        ref,
        advantages,
        entropy,
        clip=settings.clip,
        beta=settings.kl_beta,
        tau=settings.entropy_tau,
        exact_kl=exact_kl,
        weights=weights,
    )
    return loss, metrics | statistics


def fine_tune(config, run, pretrained, reward, samples, val, judge=None, checkpoint=None):
    """The controls: `study.fine_tune` of the deterministic output."""
    hard = mining.hard_samples(config, run, pretrained, samples)
    crops = Crops(hard, config.samples.crop, config.seed)
    state = attach(config, pretrained, crops, checkpoint)
    model, policy = state.live.values()
    forward = partial(model, controller=policy.mean())
    return study.fine_tune(config, run, state, crops, reward, val, forward)


# ------------------------------------------------------------------------------------- the program


def load(config, reward):
    """The pre-trained model that --init names. Raises RunError for a reward that cannot choose g*:
    a group that the judge alone had to score and could not has no best rollout."""
    if reward.is_judge_alone and not config.policy.freeze_backbone:
        raise runs.RunError("--rewards with qwen alone goes with --freeze-backbone")
    model = load_pretrained(config.init, config.policy.mask_rule)
    return model.to(config.device, memory_format=torch.channels_last)


def four_rollouts(config, state, degraded, generators):
    """Of an image (1, 3, H, W), for rollouts.png: restored (4, 3, H, W), actions (4, 12)."""
    model, policy = state.averaged.module.values()
    group = grpo.rollout(model, policy, model.encode(degraded), 4, generators)
    return group.restored[0], group.actions[0].flatten(1)


def run_program(argv):
    """The program with these flags, until it is done or asked to end."""
    config = parse(argv)
    if config.objective == "irpo":
        study.carry_out(config, load, post_train, four_rollouts)
    else:
        study.carry_out(config, load, fine_tune)


def main(argv=None):
    return runs.program("train.py", run_program, argv, study.ERRORS)


if __name__ == "__main__":
    sys.exit(main())
